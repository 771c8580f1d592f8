//! Out of a sandbox.

use std::path::{Path, PathBuf};

use oc_proto::v1::{FileType, ReadArchiveRequest, ReadFileRequest, ReadFileResponse};
use tokio::{io::AsyncWriteExt as _, runtime::Handle, sync::mpsc, task::spawn_blocking, time::timeout};
use tonic::{Status, Streaming};

use super::{Copied, STALL, joined, received::Received, unpack::unpack};
use crate::{
    commands::{files::stat, remote_path::InSandbox},
    connection::Connection,
    failure::Failure,
    output::write_failure,
    progress::Meter,
    standard,
};

/// Copies a file, or with `recursive` whatever it is.
pub async fn to_path(
    connection: &Connection,
    from: &InSandbox,
    to: &Path,
    recursive: bool,
) -> Result<Copied, Failure> {
    let to = destination(from, to)?;
    if recursive && is_directory(connection, from).await? {
        return tree(connection, from, &to).await;
    }
    let meter = Meter::new(from.path.clone(), None);
    let bytes = file(connection, from, &to, &meter, true).await?;
    Ok(Copied { files: 1, bytes, skipped: 0 })
}

/// Copies a file to our standard output.
pub async fn to_stdout(connection: &Connection, from: &InSandbox) -> Result<Copied, Failure> {
    let meter = Meter::new(from.path.clone(), None);
    let mut stdout = standard::output()?;
    let (mut content, first) = open(connection, from).await?;
    let mut bytes = 0;
    let mut part = Some(first);
    while let Some(message) = part {
        let data = message.body.unwrap_or_default().data;
        stdout.write_all(&data).await.map_err(write_failure)?;
        bytes += data.len() as u64;
        meter.add(data.len());
        part = next(&mut content, from).await?;
    }
    stdout.flush().await.map_err(write_failure)?;
    Ok(Copied { files: 1, bytes, skipped: 0 })
}

/// Into a directory that exists a copy goes under its own name.
fn destination(from: &InSandbox, to: &Path) -> Result<PathBuf, Failure> {
    let wants_directory = to.as_os_str().as_encoded_bytes().ends_with(b"/");
    if to.is_dir() {
        // The root and the home have no name: their content goes into the directory itself.
        return Ok(from.base_name().map_or_else(|| to.to_owned(), |name| to.join(name)));
    }
    if wants_directory {
        return Err(Failure::Unfit(format!("there is no directory {}", to.display())));
    }
    Ok(to.to_owned())
}

async fn is_directory(connection: &Connection, place: &InSandbox) -> Result<bool, Failure> {
    Ok(stat(connection, place).await?.r#type() == FileType::Directory)
}

async fn tree(connection: &Connection, from: &InSandbox, to: &Path) -> Result<Copied, Failure> {
    let request = ReadArchiveRequest { sandbox_id: from.id.clone(), path: from.path_or_home() };
    let mut client = connection.files();
    let mut content = match timeout(STALL, client.read_archive(request)).await {
        Ok(answer) => answer?.into_inner(),
        Err(_) => return Err(stalled(from)),
    };
    let meter = Meter::new(from.path.clone(), None);
    let (sender, messages) = mpsc::channel(1);
    let (to, handle) = (to.to_owned(), Handle::current());
    let unpacking = spawn_blocking(move || unpack(messages, &to, &handle));
    let fed = async {
        while let Some(message) = within_time(content.message(), from).await? {
            let data = message.body.unwrap_or_default().data;
            meter.add(data.len());
            // Whoever does not take it says why.
            if sender.send(data).await.is_err() {
                break;
            }
        }
        Ok(())
    };
    let fed: Result<(), Failure> = fed.await;
    drop(sender);
    let unpacked = joined(unpacking.await);
    // An archive that breaks off is no good: why it did counts.
    fed.and(unpacked)
}

async fn file(
    connection: &Connection,
    from: &InSandbox,
    to: &Path,
    meter: &Meter,
    alone: bool,
) -> Result<u64, Failure> {
    let (mut content, first) = open(connection, from).await.map_err(|failure| hint(failure, from))?;
    let info = first.info.clone().unwrap_or_default();
    if alone {
        // What `/proc` holds says it is empty.
        meter.expect(u64::try_from(info.size).ok().filter(|size| *size > 0));
    }
    let mut received = Received::create(to, if info.mode == 0 { 0o644 } else { info.mode })?;
    let mut bytes = 0;
    let mut part = Some(first);
    while let Some(message) = part {
        let data = message.body.unwrap_or_default().data;
        received.write(&data).await?;
        bytes += data.len() as u64;
        meter.add(data.len());
        part = next(&mut content, from).await?;
    }
    received.finish().await?;
    Ok(bytes)
}

fn hint(failure: Failure, from: &InSandbox) -> Failure {
    if failure.has_reason("NOT_A_FILE") {
        return Failure::Usage(format!("{}:{} is not a file: copy a directory with -r", from.id, from.path));
    }
    failure
}

/// Starts to read; the first message is there, so the file exists and can be read.
async fn open(
    connection: &Connection,
    from: &InSandbox,
) -> Result<(Streaming<ReadFileResponse>, ReadFileResponse), Failure> {
    let request =
        ReadFileRequest { sandbox_id: from.id.clone(), path: from.path_or_home(), offset: 0, limit: 0 };
    let mut client = connection.files();
    let mut content = match timeout(STALL, client.read_file(request)).await {
        Ok(answer) => answer?.into_inner(),
        Err(_) => return Err(stalled(from)),
    };
    let first = next(&mut content, from).await?.unwrap_or_default();
    Ok((content, first))
}

async fn next(
    content: &mut Streaming<ReadFileResponse>,
    from: &InSandbox,
) -> Result<Option<ReadFileResponse>, Failure> {
    within_time(content.message(), from).await
}

/// What comes next, unless nothing moves.
async fn within_time<T>(
    next: impl Future<Output = Result<T, Status>>,
    from: &InSandbox,
) -> Result<T, Failure> {
    match timeout(STALL, next).await {
        Ok(message) => Ok(message?),
        Err(_) => Err(stalled(from)),
    }
}

fn stalled(from: &InSandbox) -> Failure {
    Failure::Stalled(format!("{}:{}: the transfer stands still", from.id, from.path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_on_our_side_gets_the_file_under_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let from = |path: &str| InSandbox { id: "sb-1".into(), path: path.into() };
        let to = directory.path();
        assert_eq!(destination(&from("/a/b"), to).unwrap(), to.join("b"));
        assert_eq!(destination(&from("/"), to).unwrap(), to);
        assert_eq!(destination(&from("/a/b"), &to.join("c")).unwrap(), to.join("c"));
        assert!(destination(&from("/a/b"), &to.join("c/")).is_err());
    }
}
