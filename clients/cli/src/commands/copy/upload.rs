//! Into a sandbox.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, stream};
use oc_proto::{
    google::api::HttpBody,
    v1::{FileType, WriteArchiveRequest, WriteFileRequest},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    sync::mpsc,
    task::spawn_blocking,
    time::timeout,
};
use tonic::Status;

use super::{Copied, STALL, joined, pack::Tree};
use crate::{
    commands::{
        files::{entries, stat},
        remote_path::InSandbox,
    },
    connection::Connection,
    failure::Failure,
    progress::Meter,
    standard,
};

/// Content per message; the contract allows 1 MiB.
pub const MESSAGE_BYTES: usize = 512 << 10;
/// From the last byte sent to the answer: the guest writes its disk back.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(120);

/// Copies a file, or with `recursive` a directory.
pub async fn from_path(
    connection: &Connection,
    from: &Path,
    to: &InSandbox,
    recursive: bool,
) -> Result<Copied, Failure> {
    let metadata = fs::metadata(from).map_err(|error| cannot_read(from, error))?;
    if metadata.is_dir() && !recursive {
        return Err(Failure::Usage(format!("{} is a directory: copy it with -r", from.display())));
    }
    let to = if is_directory(connection, to).await? { to.join(&name_of(from)?) } else { to.clone() };
    if metadata.is_dir() {
        return tree(connection, from, &to).await;
    }
    let meter = Meter::new(from.display().to_string(), metadata.is_file().then_some(metadata.len()));
    let bytes = file(connection, from, &to, &meter).await?;
    Ok(Copied { files: 1, bytes, skipped: 0 })
}

/// Copies our standard input to a file.
pub async fn from_stdin(connection: &Connection, to: &InSandbox) -> Result<Copied, Failure> {
    let mut input = standard::input()?;
    input.set_max_buf_size(MESSAGE_BYTES);
    let meter = Meter::new("standard input".to_owned(), None);
    let bytes = send(connection, input, "standard input", to, 0, &meter).await?;
    Ok(Copied { files: 1, bytes, skipped: 0 })
}

/// Whether the copy goes into `place` under its own name. A link is looked through.
async fn is_directory(connection: &Connection, place: &InSandbox) -> Result<bool, Failure> {
    if place.path.is_empty() || place.path.ends_with('/') {
        return Ok(true);
    }
    match stat(connection, place).await {
        Ok(info) if info.r#type() == FileType::Symlink => match entries(connection, place).await {
            Ok(_) => Ok(true),
            Err(failure) if failure.has_reason("DIRECTORY_TOO_LARGE") => Ok(true),
            Err(failure) if failure.has_reason("NOT_A_DIRECTORY") || failure.has_reason("FILE_NOT_FOUND") => {
                Ok(false)
            }
            Err(failure) => Err(failure),
        },
        Ok(info) => Ok(info.r#type() == FileType::Directory),
        Err(failure) if failure.has_reason("FILE_NOT_FOUND") => Ok(false),
        Err(failure) => Err(failure),
    }
}

/// The name of a file of ours, `.` and `..` resolved.
fn name_of(path: &Path) -> Result<String, Failure> {
    let name = match path.file_name() {
        Some(name) => name.to_owned(),
        None => {
            let path = path.canonicalize().map_err(|error| cannot_read(path, error))?;
            path.file_name().map(ToOwned::to_owned).ok_or_else(|| {
                Failure::Usage(format!(
                    "{} has no name to copy it under: name the destination",
                    path.display()
                ))
            })?
        }
    };
    // Names in a sandbox are text to the contract.
    name.to_str().map(ToOwned::to_owned).ok_or_else(|| {
        Failure::Unfit(format!(
            "the name of {} is not UTF-8: rename it, or name the destination",
            path.display()
        ))
    })
}

async fn tree(connection: &Connection, from: &Path, to: &InSandbox) -> Result<Copied, Failure> {
    // The whole walk comes first: what cannot be copied is said before anything is.
    let tree = Tree::walk(from)?;
    let copied = Copied { files: tree.files, bytes: tree.bytes, skipped: tree.skipped };
    let meter = Meter::new(from.display().to_string(), Some(tree.bytes));
    let (parts, messages) = mpsc::channel(1);
    let mut client = connection.files();
    let call = client.write_archive(until_end(messages));
    let opening = WriteArchiveRequest { sandbox_id: to.id.clone(), path: to.path_or_home(), body: None };
    let feed = async {
        pass(&parts, Part::Message(opening), to).await?;
        let (sender, mut archive) = mpsc::channel(1);
        let packing = spawn_blocking(move || tree.pack(sender, &meter));
        while let Some(data) = archive.recv().await {
            let body = Some(HttpBody { data, ..HttpBody::default() });
            let message = WriteArchiveRequest { body, ..WriteArchiveRequest::default() };
            pass(&parts, Part::Message(message), to).await?;
        }
        joined(packing.await)?;
        pass(&parts, Part::End, to).await
    };
    answered(call, feed, to).await.map(|()| copied)
}

async fn file(connection: &Connection, from: &Path, to: &InSandbox, meter: &Meter) -> Result<u64, Failure> {
    let mut file = tokio::fs::File::open(from).await.map_err(|error| cannot_read(from, error))?;
    let metadata = file.metadata().await.map_err(|error| cannot_read(from, error))?;
    file.set_max_buf_size(MESSAGE_BYTES);
    let mode = if metadata.is_file() { metadata.permissions().mode() & 0o777 } else { 0 };
    send(connection, file, &from.display().to_string(), to, mode, meter).await
}

/// A failure to read something of ours.
pub fn cannot_read(path: &Path, error: std::io::Error) -> Failure {
    Failure::local(format!("cannot read {}", path.display()), error)
}

/// What goes to the stream of messages. A stream that ends is a file that is whole: so the end must be said,
/// and a stream that was let go without it never ends, and is reset with its call.
enum Part<M> {
    Message(M),
    End,
}

async fn send(
    connection: &Connection,
    source: impl AsyncRead + Unpin,
    name: &str,
    to: &InSandbox,
    mode: u32,
    meter: &Meter,
) -> Result<u64, Failure> {
    let (parts, messages) = mpsc::channel(1);
    let mut client = connection.files();
    let call = client.write_file(until_end(messages));
    answered(call, feed(source, name, to, mode, &parts, meter), to).await
}

/// What a call is fed with, once it has answered.
async fn answered<T, Answer>(
    call: impl Future<Output = Result<Answer, Status>>,
    feed: impl Future<Output = Result<T, Failure>>,
    to: &InSandbox,
) -> Result<T, Failure> {
    let mut call = std::pin::pin!(call);
    let fed = tokio::select! {
        answer = &mut call => {
            // Before the end it can only be a refusal.
            answer?;
            return Err(Failure::Stalled(format!("{}:{}: the mesh ended the transfer early", to.id, to.path)));
        }
        fed = feed => fed?,
    };
    match timeout(COMMIT_TIMEOUT, call).await {
        Ok(answer) => answer.map(|_| fed).map_err(Failure::from),
        Err(_) => Err(stalled(to)),
    }
}

async fn feed(
    mut source: impl AsyncRead + Unpin,
    name: &str,
    to: &InSandbox,
    mode: u32,
    parts: &mpsc::Sender<Part<WriteFileRequest>>,
    meter: &Meter,
) -> Result<u64, Failure> {
    let opening = WriteFileRequest { sandbox_id: to.id.clone(), path: to.path_or_home(), mode, body: None };
    pass(parts, Part::Message(opening), to).await?;
    let mut sent = 0;
    loop {
        let data =
            next(&mut source).await.map_err(|error| Failure::local(format!("cannot read {name}"), error))?;
        if data.is_empty() {
            break;
        }
        let size = data.len();
        let body = HttpBody { data, ..HttpBody::default() };
        pass(parts, Part::Message(WriteFileRequest { body: Some(body), ..WriteFileRequest::default() }), to)
            .await?;
        sent += size as u64;
        meter.add(size);
    }
    pass(parts, Part::End, to).await?;
    Ok(sent)
}

/// The next message's content, empty at the end.
async fn next(source: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Bytes> {
    let mut data = BytesMut::with_capacity(MESSAGE_BYTES);
    while data.len() < MESSAGE_BYTES {
        let room = (MESSAGE_BYTES - data.len()) as u64;
        if source.take(room).read_buf(&mut data).await? == 0 {
            break;
        }
    }
    Ok(data.freeze())
}

async fn pass<M>(parts: &mpsc::Sender<Part<M>>, part: Part<M>, to: &InSandbox) -> Result<(), Failure> {
    match timeout(STALL, parts.send(part)).await {
        Ok(Ok(())) => Ok(()),
        // The call is over: its answer, which is awaited beside this, says why.
        Ok(Err(_)) => std::future::pending().await,
        Err(_) => Err(stalled(to)),
    }
}

fn until_end<M: Send + 'static>(messages: mpsc::Receiver<Part<M>>) -> impl Stream<Item = M> + Send + 'static {
    stream::unfold(messages, async |mut messages| match messages.recv().await {
        Some(Part::Message(message)) => Some((message, messages)),
        Some(Part::End) => None,
        None => std::future::pending().await,
    })
}

fn stalled(to: &InSandbox) -> Failure {
    Failure::Stalled(format!("{}:{}: the transfer stands still", to.id, to.path))
}
