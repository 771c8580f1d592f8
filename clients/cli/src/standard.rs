//! Our standard input and output as unbuffered files, for bytes in bulk.

use std::{io, os::fd::AsFd as _};

use tokio::fs::File;

use crate::failure::Failure;

/// Standard input.
pub fn input() -> Result<File, Failure> {
    let fd = io::stdin().as_fd().try_clone_to_owned();
    let fd = fd.map_err(|error| Failure::local("cannot read standard input", error))?;
    Ok(std::fs::File::from(fd).into())
}

/// Standard output.
pub fn output() -> Result<File, Failure> {
    let fd = io::stdout().as_fd().try_clone_to_owned();
    let fd = fd.map_err(|error| Failure::local("cannot write to standard output", error))?;
    Ok(std::fs::File::from(fd).into())
}
