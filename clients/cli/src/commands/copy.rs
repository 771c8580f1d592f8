//! `oc files cp`: files and trees, into a sandbox and out of it.
//!
//! As with `cp`, a destination that is a directory gets the source under its own name. Content is streamed:
//! memory does not grow with size. A tree goes as one archive. Links and special files in it are left out and counted: a link
//! made by a sandbox could point anywhere on this machine.

mod download;
mod pack;
mod received;
mod unpack;
mod upload;

use serde_json::json;

use crate::{
    arguments::Global,
    commands::{connect, remote_path::Side},
    failure::Failure,
    output::{self, Output},
};

/// Bounds for a tree: a cycle, or a sandbox that makes up directories, ends here.
const TREE_ENTRIES: usize = 100_000;
const TREE_DEPTH: usize = 64;
/// A transfer during which nothing moves for so long has failed.
const STALL: std::time::Duration = std::time::Duration::from_secs(60);

/// What was copied.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Copied {
    files: u64,
    bytes: u64,
    /// Links and special files, left out.
    skipped: u64,
}

/// What a thread of its own has done.
fn joined<T>(done: Result<Result<T, Failure>, tokio::task::JoinError>) -> Result<T, Failure> {
    done.unwrap_or_else(|error| Err(Failure::local("cannot copy", std::io::Error::other(error))))
}

/// `oc files cp`.
pub async fn run(
    global: &Global,
    sides: (Side, Side),
    recursive: bool,
    output: Output,
) -> Result<(), Failure> {
    let usage = |text: &str| Err(Failure::Usage(text.to_owned()));
    let to_stdout = sides.1 == Side::Standard;
    let copied = match sides {
        (Side::Standard, _) | (_, Side::Standard) if recursive => {
            return usage("a directory cannot be copied through standard input or output");
        }
        (Side::Local(from), Side::Sandbox(to)) => {
            upload::from_path(&connect(global).await?, &from, &to, recursive).await?
        }
        (Side::Standard, Side::Sandbox(to)) => upload::from_stdin(&connect(global).await?, &to).await?,
        (Side::Sandbox(from), Side::Local(to)) => {
            download::to_path(&connect(global).await?, &from, &to, recursive).await?
        }
        (Side::Sandbox(from), Side::Standard) => download::to_stdout(&connect(global).await?, &from).await?,
        (Side::Sandbox(_), Side::Sandbox(_)) => {
            return usage("one side must be on this machine: copy out of one sandbox, then into the other");
        }
        _ => return usage("one side must be in a sandbox: ID:PATH, where ID begins with sb-"),
    };
    if copied.skipped > 0 {
        output::note(format_args!("oc: {} links and special files were left out", copied.skipped));
    }
    if to_stdout {
        // Standard output holds the file.
        return Ok(());
    }
    output.show(
        || json!({ "files": copied.files, "bytes": copied.bytes, "skipped": copied.skipped }),
        String::new,
    )
}
