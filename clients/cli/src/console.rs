//! Where a session's output goes: our standard output and standard error, byte for byte and as it comes. Written aside,
//! so that a reader who is slow holds back the session, and not our answers to the mesh.

use std::{fmt, io, os::fd::AsFd as _};

use oc_proto::v1::ExecStream;
use tokio::{fs::File, io::AsyncWriteExt as _};

use crate::{
    failure::Failure,
    output::{self, write_failure},
    standard,
};

/// Our standard output and standard error.
#[derive(Debug)]
pub struct Console {
    stdout: File,
    /// Absent where it is closed: as a program that runs here, nobody is told.
    stderr: Option<File>,
    is_raw: bool,
}

impl Console {
    /// Ours; `is_raw` says that a terminal does nothing of its own with what we write.
    pub fn new(is_raw: bool) -> Result<Self, Failure> {
        let stderr = io::stderr().as_fd().try_clone_to_owned().ok();
        let stderr = stderr.map(|fd| std::fs::File::from(fd).into());
        Ok(Self { stdout: standard::output()?, stderr, is_raw })
    }

    /// Writes output to where it belongs.
    pub async fn write(&mut self, stream: ExecStream, bytes: &[u8]) -> Result<(), Failure> {
        match (stream, &mut self.stderr) {
            (ExecStream::Stderr, Some(stderr)) => {
                let written = async {
                    stderr.write_all(bytes).await?;
                    stderr.flush().await
                };
                if written.await.is_err() {
                    self.stderr = None;
                }
                Ok(())
            }
            (ExecStream::Stderr, None) => Ok(()),
            _ => {
                let written = async {
                    self.stdout.write_all(bytes).await?;
                    self.stdout.flush().await
                };
                written.await.map_err(write_failure)
            }
        }
    }

    /// Says something to people, on a line of its own.
    pub fn note(&self, text: impl fmt::Display) {
        if self.is_raw {
            output::note(format_args!("\r\n{text}\r"));
        } else {
            output::note(text);
        }
    }
}
