//! Flags of `oc preview`.

use clap::{Args, Subcommand};

/// `oc preview`.
#[derive(Debug, Subcommand)]
pub enum PreviewCommand {
    /// Make a port one that is listed, and print its URL; ports are reached without it, too
    Create(CreatePreviewArguments),
    /// List a sandbox's previews
    #[command(visible_alias = "ls")]
    List {
        /// ID of the sandbox
        sandbox: String,
    },
    /// Delete a preview, and release its own host name
    #[command(visible_alias = "rm")]
    Delete {
        /// ID of the sandbox
        sandbox: String,
        /// The port
        #[arg(value_parser = clap::value_parser!(u16).range(1..))]
        port: u16,
    },
    /// Have all ports of a sandbox ask for a new token; only now can it be read
    RotateAuth {
        /// ID of the sandbox
        sandbox: String,
        /// Have them ask for none instead
        #[arg(long)]
        remove: bool,
    },
}

/// `oc preview create`.
#[derive(Debug, Args)]
pub struct CreatePreviewArguments {
    /// ID of the sandbox
    pub sandbox: String,
    /// Port in the sandbox
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    pub port: u16,
    /// Host name of its own, which must lead to the gateway
    #[arg(long, value_name = "NAME")]
    pub domain: Option<String>,
    /// Have all ports of the sandbox ask for this token; without a value for a new one, printed now and never again
    #[arg(long, value_name = "TOKEN", num_args = 0..=1, default_missing_value = "auto")]
    pub auth: Option<String>,
}
