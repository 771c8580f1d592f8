//! What is asked about.

use std::{
    io,
    path::{self, PathBuf},
};

use clap::{
    Parser,
    builder::{PathBufValueParser, TypedValueParser},
};
use oc_proto::v1::VmmKind;

use crate::config::{NetworkChoice, VmmChoice};

/// Print as JSON what this machine lacks to carry sandboxes, and what would be better otherwise; `oc node doctor` shows it
#[derive(Clone, Debug, Parser)]
pub struct Subject {
    /// Where everything that the agent makes is to lie. It need not be there yet
    #[arg(long, env = "OC_DATA_DIR", value_parser = absolute())]
    pub data_dir: PathBuf,
    /// Where the templates lie
    #[arg(long, env = "OC_IMAGE_DIR", default_value = "/var/cache/opencomputer/images", value_parser = absolute())]
    pub image_dir: PathBuf,
    /// Disk space that must stay free, MiB
    #[arg(long, env = "OC_DISK_RESERVE_MB", default_value_t = 2048)]
    pub disk_reserve_mb: u64,
    /// Whether VMs are to have a network
    #[arg(long, env = "OC_NETWORK", value_enum, default_value_t = NetworkChoice::On)]
    pub network: NetworkChoice,
    /// What is to run microVMs; any that can, unless told
    #[arg(long, env = "OC_VMM", value_enum, default_value_t = VmmChoice::Auto)]
    pub vmm: VmmChoice,
    /// Firecracker: a path, or a name that is looked for as programs are
    #[arg(long, env = "OC_FIRECRACKER", default_value = "firecracker", value_name = "PATH", value_parser = program())]
    pub firecracker: PathBuf,
    /// Its jailer, of the same version
    #[arg(long, env = "OC_JAILER", default_value = "jailer", value_name = "PATH", value_parser = program())]
    pub jailer: PathBuf,
}

/// A path, from the root.
fn absolute() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(path::absolute)
}

/// A program's path, from the root, or its name alone.
fn program() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|named| -> io::Result<PathBuf> {
        if named.components().count() > 1 { path::absolute(named) } else { Ok(named) }
    })
}

impl Subject {
    /// The VMMs that are asked about.
    pub fn vmms(&self) -> &'static [VmmKind] {
        match self.vmm {
            VmmChoice::Auto => super::finding::BOTH,
            VmmChoice::Qemu => super::finding::QEMU,
            VmmChoice::Firecracker => super::finding::FIRECRACKER,
        }
    }

    /// Whether VMs are to have a network.
    pub fn has_network(&self) -> bool {
        self.network == NetworkChoice::On
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_from_the_root_and_names_stay() {
        let words = ["doctor", "--data-dir", "d", "--firecracker", "./fc", "--jailer", "jailer-1.15"];
        let subject = Subject::try_parse_from(words).unwrap();
        let here = std::env::current_dir().unwrap();
        assert_eq!((subject.data_dir, subject.firecracker), (here.join("d"), here.join("fc")));
        assert_eq!(subject.jailer, PathBuf::from("jailer-1.15"));
    }
}
