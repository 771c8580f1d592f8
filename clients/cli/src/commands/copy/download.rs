//! Out of a sandbox.

use std::{
    fs,
    os::unix::fs::DirBuilderExt as _,
    path::{Component, Path, PathBuf},
};

use futures_util::{TryStreamExt as _, stream};
use oc_proto::v1::{FileInfo, FileType, ReadFileRequest, ReadFileResponse};
use tokio::{io::AsyncWriteExt as _, time::timeout};
use tonic::Streaming;

use super::{
    Copied, FILES_AT_ONCE, STALL, TREE_DEPTH, TREE_ENTRIES,
    received::{Received, cannot_write},
};
use crate::{
    commands::{
        files::{entries, stat},
        remote_path::InSandbox,
    },
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

/// A file of a tree.
struct Leaf {
    from: InSandbox,
    to: PathBuf,
}

async fn tree(connection: &Connection, from: &InSandbox, to: &Path) -> Result<Copied, Failure> {
    let mut leaves = Vec::new();
    let mut copied = Copied::default();
    let mut expected = 0;
    let mut open = vec![(from.clone(), to.to_owned(), 0)];
    let mut seen = 0;
    while let Some((directory, path, depth)) = open.pop() {
        make_directory(&path)?;
        let entries = entries(connection, &directory).await?;
        seen += entries.len();
        if depth > TREE_DEPTH || seen > TREE_ENTRIES {
            return Err(Failure::Unfit(format!(
                "{} holds more than {TREE_ENTRIES} files, or lies more than {TREE_DEPTH} deep: pack it first",
                directory.path
            )));
        }
        for entry in entries {
            let path = path.join(safe_name(&entry, &directory)?);
            let from = directory.join(&entry.name);
            match entry.r#type() {
                FileType::Directory => open.push((from, path, depth + 1)),
                FileType::File => {
                    expected += u64::try_from(entry.size).unwrap_or(0);
                    leaves.push(Leaf { from, to: path });
                }
                FileType::Symlink | FileType::Unspecified => copied.skipped += 1,
            }
        }
    }
    copied.files = leaves.len() as u64;
    let meter = &Meter::new(from.path.clone(), Some(expected));
    copied.bytes = stream::iter(leaves.into_iter().map(Ok))
        .map_ok(async |leaf: Leaf| file(connection, &leaf.from, &leaf.to, meter, false).await)
        .try_buffer_unordered(FILES_AT_ONCE)
        .try_fold(0, async |sum, bytes| Ok(sum + bytes))
        .await?;
    Ok(copied)
}

/// Whoever made up the name may mean harm: it must be one name, not a way to somewhere.
fn safe_name<'a>(entry: &'a FileInfo, directory: &InSandbox) -> Result<&'a str, Failure> {
    let mut components = Path::new(&entry.name).components();
    match (components.next(), components.next()) {
        (Some(Component::Normal(name)), None)
            if name == entry.name.as_str() && !entry.name.contains('\0') =>
        {
            Ok(&entry.name)
        }
        _ => Err(Failure::Unfit(format!("{} holds an unsafe name: {:?}", directory.path, entry.name))),
    }
}

/// Makes a directory, or takes one that is there; a link to one is not followed.
fn make_directory(path: &Path) -> Result<(), Failure> {
    match fs::DirBuilder::new().mode(0o755).create(path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            let there = fs::symlink_metadata(path).map_err(|error| cannot_write(path, error))?;
            if there.is_dir() { Ok(()) } else { Err(cannot_write(path, error)) }
        }
        result => result.map_err(|error| cannot_write(path, error)),
    }
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
    match timeout(STALL, content.message()).await {
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
    fn names_from_a_sandbox_cannot_leave_the_directory() {
        let directory = InSandbox { id: "sb-1".into(), path: "d".into() };
        let safe = |name: &str| {
            let entry = FileInfo { name: name.into(), ..FileInfo::default() };
            safe_name(&entry, &directory).is_ok()
        };
        for name in ["a", "a b", "...", "-rf", "\n", "ä", "a\\b"] {
            assert!(safe(name), "{name:?}");
        }
        for name in ["", ".", "..", "/", "/etc", "a/b", "../a", "a/", "./a", "a\0"] {
            assert!(!safe(name), "{name:?}");
        }
    }

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

    #[test]
    fn a_link_that_stands_where_a_directory_should_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink("/tmp", &link).unwrap();
        assert!(make_directory(&link).is_err());
        make_directory(&directory.path().join("new")).unwrap();
        make_directory(&directory.path().join("new")).unwrap();
    }
}
