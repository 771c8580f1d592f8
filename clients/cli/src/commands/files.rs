//! `oc files`.

use jiff::Timestamp;
use oc_proto::v1::{
    CreateDownloadUrlRequest, CreateUploadUrlRequest, FileInfo, FileType, ListDirectoryRequest,
    MakeDirectoryRequest, RemoveFileRequest, RenameFileRequest, StatFileRequest,
};

use crate::{
    arguments::{FilesCommand, Global, RemotePath},
    commands::{
        connect, copy, directory_watch,
        remote_path::{InSandbox, Side},
        sandboxes::{age, time},
    },
    connection::{CALL_TIMEOUT, Connection, within},
    failure::Failure,
    json,
    output::{self, Output},
    progress,
};

/// `oc files …`. The command line is checked before anything is connected to.
pub async fn run(global: &Global, command: FilesCommand, output: Output) -> Result<(), Failure> {
    match command {
        FilesCommand::Ls(path) => list(&path, global, output).await,
        FilesCommand::Cp(arguments) => {
            let sides = (Side::parse(&arguments.source), Side::parse(&arguments.destination));
            copy::run(global, sides, arguments.recursive, output).await
        }
        FilesCommand::Rm(path) => {
            let InSandbox { id: sandbox_id, path } = path.place_with_path()?;
            let request = within(CALL_TIMEOUT, RemoveFileRequest { sandbox_id, path });
            progress::during("removing", connect(global).await?.files().remove_file(request)).await?;
            output.done()
        }
        FilesCommand::Mkdir(path) => {
            let InSandbox { id: sandbox_id, path } = path.place_with_path()?;
            let request = within(CALL_TIMEOUT, MakeDirectoryRequest { sandbox_id, path, mode: 0 });
            connect(global).await?.files().make_directory(request).await?;
            output.done()
        }
        FilesCommand::Stat(path) => {
            let place = path.place_with_path()?;
            let info = stat(&connect(global).await?, &place).await?;
            output.show(|| json::of(&info), || details(&info))
        }
        FilesCommand::Mv { paths } => {
            let request = within(CALL_TIMEOUT, rename(&paths)?);
            connect(global).await?.files().rename_file(request).await?;
            output.done()
        }
        FilesCommand::Watch { path, recursive } => {
            let place = path.place()?;
            directory_watch::run(&connect(global).await?, &place, recursive, output).await
        }
        FilesCommand::Url { path, upload, expires } => {
            let place = path.place_with_path()?;
            print_url(&connect(global).await?, place, upload, expires, output).await
        }
    }
}

async fn list(path: &RemotePath, global: &Global, output: Output) -> Result<(), Failure> {
    let place = path.place()?;
    let connection = connect(global).await?;
    let entries = progress::during("listing", entries(&connection, &place)).await?;
    output.show(|| json::list(&entries), || table(&entries, Timestamp::now()))
}

/// What is in a directory.
pub async fn entries(connection: &Connection, place: &InSandbox) -> Result<Vec<FileInfo>, Failure> {
    let request = ListDirectoryRequest { sandbox_id: place.id.clone(), path: place.path_or_home() };
    Ok(connection.files().list_directory(within(CALL_TIMEOUT, request)).await?.into_inner().entries)
}

/// Describes what `place` names.
pub async fn stat(connection: &Connection, place: &InSandbox) -> Result<FileInfo, Failure> {
    let request = StatFileRequest { sandbox_id: place.id.clone(), path: place.path_or_home() };
    let answer = connection.files().stat_file(within(CALL_TIMEOUT, request)).await?;
    Ok(answer.into_inner().info.unwrap_or_default())
}

async fn print_url(
    connection: &Connection,
    place: InSandbox,
    is_upload: bool,
    expires_in: Option<i32>,
    output: Output,
) -> Result<(), Failure> {
    let InSandbox { id: sandbox_id, path } = place;
    let mut client = connection.file_urls();
    if is_upload {
        let request = within(CALL_TIMEOUT, CreateUploadUrlRequest { sandbox_id, path, expires_in });
        let answer = client.create_upload_url(request).await?.into_inner();
        output.show(|| json::of(&answer), || answer.url.clone())
    } else {
        let request = within(CALL_TIMEOUT, CreateDownloadUrlRequest { sandbox_id, path, expires_in });
        let answer = client.create_download_url(request).await?.into_inner();
        output.show(|| json::of(&answer), || answer.url.clone())
    }
}

fn rename(paths: &[String]) -> Result<RenameFileRequest, Failure> {
    let (place, to) = match paths {
        [from, to] => (InSandbox::with_path(from, None)?, to),
        [id, from, to] => (InSandbox::with_path(id, Some(from))?, to),
        _ => return Err(Failure::Usage("give ID:FROM TO, or ID FROM TO".to_owned())),
    };
    // `ID:TO` is what comes naturally after `ID:FROM`.
    let to = match Side::parse(to.as_ref()) {
        Side::Sandbox(other) if other.id == place.id => other.path,
        Side::Sandbox(_) => return Err(Failure::Usage("a file cannot move to another sandbox".to_owned())),
        _ => to.clone(),
    };
    Ok(RenameFileRequest { sandbox_id: place.id, from: place.path, to })
}

fn table(entries: &[FileInfo], now: Timestamp) -> String {
    let rows = entries.iter().map(|entry| {
        [
            kind(entry),
            format!("{:04o}", entry.mode & 0o7777),
            entry.size.to_string(),
            entry.modified_at.map(|at| age(at.seconds, now)).unwrap_or_default(),
            if entry.link_target.is_empty() {
                entry.name.clone()
            } else {
                format!("{} -> {}", entry.name, entry.link_target)
            },
        ]
    });
    output::table(["TYPE", "MODE", "SIZE", "AGE", "NAME"], rows)
}

fn details(info: &FileInfo) -> String {
    output::pairs([
        ("path", info.path.clone()),
        ("type", kind(info)),
        ("target", info.link_target.clone()),
        ("size", info.size.to_string()),
        ("mode", format!("{:04o}", info.mode & 0o7777)),
        ("owner", format!("{}:{}", info.uid, info.gid)),
        ("modified", info.modified_at.map(|at| time(at.seconds)).unwrap_or_default()),
    ])
}

fn kind(info: &FileInfo) -> String {
    match info.r#type() {
        FileType::Unspecified => "other",
        FileType::File => "file",
        FileType::Directory => "directory",
        FileType::Symlink => "symlink",
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn renamed(paths: &[&str]) -> Result<(String, String, String), Failure> {
        let paths: Vec<_> = paths.iter().map(|&path| path.to_owned()).collect();
        rename(&paths).map(|request| (request.sandbox_id, request.from, request.to))
    }

    #[test]
    fn a_rename_may_be_written_in_three_ways() {
        let expected = ("sb-1".to_owned(), "a".to_owned(), "b".to_owned());
        assert_eq!(renamed(&["sb-1:a", "b"]).unwrap(), expected);
        assert_eq!(renamed(&["sb-1:a", "sb-1:b"]).unwrap(), expected);
        assert_eq!(renamed(&["sb-1", "a", "b"]).unwrap(), expected);
        assert!(renamed(&["sb-1:a", "sb-2:b"]).is_err());
        assert!(renamed(&["a", "b"]).is_err());
    }
}
