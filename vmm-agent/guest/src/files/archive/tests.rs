use std::{
    fs::{self, File},
    future::Future,
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _, symlink},
        net::UnixListener,
    },
    path::Path,
    process::Command,
};

use futures_util::{StreamExt as _, stream};
use oc_proto::{
    google::api::HttpBody,
    v1::{file_service_client::FileServiceClient, file_service_server::FileServiceServer},
};
use tar::{EntryType, Header};
use tempfile::{TempDir, tempdir};
use tokio::runtime;
use tonic_types::StatusExt as _;

use super::*;
use crate::files::Files;

const OWNER: Owner = Owner { uid: 1234, gid: 1235 };

fn pack(path: &Path) -> Vec<u8> {
    send(pack::Top::open(path).unwrap())
}

fn send(top: pack::Top) -> Vec<u8> {
    let (sender, mut parts) = mpsc::channel(AHEAD);
    let sending = std::thread::spawn(move || top.send(&sender));
    let mut archive = Vec::new();
    while let Some(part) = parts.blocking_recv() {
        let data = part.unwrap().body.unwrap().data;
        assert!(data.len() <= 512 << 10);
        archive.extend_from_slice(&data);
    }
    sending.join().unwrap();
    archive
}

/// Unpacks `archive` in pieces of `piece` bytes, and then how the stream broke.
fn unpack_broken(
    directory: &Path,
    archive: &[u8],
    piece: usize,
    end: Option<Status>,
) -> Result<WriteArchiveResponse, Status> {
    let (sender, parts) = mpsc::channel(1);
    let directory = directory.to_owned();
    let unpacking = std::thread::spawn(move || unpack::unpack(&directory, parts, OWNER));
    let pieces = archive.chunks(piece).map(|piece| Ok(Bytes::copy_from_slice(piece)));
    for part in pieces.chain(end.map(Err)) {
        if sender.blocking_send(part).is_err() {
            break;
        }
    }
    drop(sender);
    unpacking.join().unwrap()
}

fn unpack(directory: &Path, archive: &[u8]) -> Result<WriteArchiveResponse, Status> {
    unpack_broken(directory, archive, 64 << 10, None)
}

fn reason(error: &Status) -> String {
    error.get_error_details().error_info().unwrap().reason.clone()
}

fn tar(arguments: &[&str], directory: &Path) {
    let run = Command::new("tar").args(arguments).current_dir(directory).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
}

/// What is in a directory: a line for each path, with type, mode and content.
fn look(directory: &Path) -> Vec<String> {
    fn into(directory: &Path, name: &Path, lines: &mut Vec<String>) {
        for entry in fs::read_dir(directory.join(name)).unwrap() {
            let name = name.join(entry.unwrap().file_name());
            let path = directory.join(&name);
            let found = fs::symlink_metadata(&path).unwrap();
            let mode = found.mode() & 0o7777;
            if found.is_dir() {
                lines.push(format!("{} d {mode:o}", name.display()));
                into(directory, &name, lines);
            } else if found.is_symlink() {
                lines.push(format!("{} -> {}", name.display(), fs::read_link(path).unwrap().display()));
            } else {
                let content = fs::read(path).unwrap();
                let sum = content.iter().fold(0_u32, |sum, byte| sum.wrapping_mul(31) + u32::from(*byte));
                let (size, time) = (content.len(), found.mtime());
                lines.push(format!("{} f {mode:o} {size} {sum} {time}", name.display()));
            }
        }
    }
    let mut lines = Vec::new();
    into(directory, Path::new(""), &mut lines);
    lines.sort();
    lines
}

/// A directory with something of everything.
fn sample() -> TempDir {
    let directory = tempdir().unwrap();
    let root = directory.path();
    let deep = root.join("d".repeat(120)).join("e".repeat(120)).join("f".repeat(120));
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("x"), "deep").unwrap();
    symlink("y".repeat(200), deep.join("long link")).unwrap();
    fs::write(root.join("empty"), "").unwrap();
    fs::write(root.join("block"), [7; 512]).unwrap();
    let large: Vec<u8> = (0_u32..400_000).flat_map(u32::to_le_bytes).collect();
    fs::write(root.join("large"), large).unwrap();
    fs::write(root.join("run"), "#!").unwrap();
    fs::set_permissions(root.join("run"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("/nowhere", root.join("link")).unwrap();
    fs::create_dir(root.join("none")).unwrap();
    fs::set_permissions(root.join("none"), fs::Permissions::from_mode(0o700)).unwrap();
    directory
}

/// An entry as no honest tar would write it.
fn entry(kind: EntryType, name: &str, link: &str, mode: u32, content: &[u8]) -> Vec<u8> {
    let mut header = Header::new_ustar();
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_mtime(1_000_000_000);
    header.set_size(content.len() as u64);
    header.set_cksum();
    let mut entry = [header.as_bytes().as_slice(), content].concat();
    entry.resize(entry.len().next_multiple_of(512), 0);
    entry
}

fn file(name: &str, content: &str) -> Vec<u8> {
    entry(EntryType::Regular, name, "", 0o644, content.as_bytes())
}

#[test]
fn what_is_packed_is_unpacked_the_same() {
    let (from, to, by_tar) = (sample(), tempdir().unwrap(), tempdir().unwrap());
    let _socket = UnixListener::bind(from.path().join("socket")).unwrap();
    let archive = pack(from.path());
    assert_eq!(archive.len() % 512, 0);
    fs::remove_file(from.path().join("socket")).unwrap();

    let done = unpack(&to.path().join("made/for it"), &archive).unwrap();
    let to = to.path().join("made/for it");
    assert_eq!(look(&to), look(from.path()));
    assert_eq!((done.entries, done.bytes), (11, 4 + 512 + 1_600_000 + 2));
    if nix::unistd::Uid::effective().is_root() {
        for name in ["", "empty", "link", "none"] {
            let found = fs::symlink_metadata(to.join(name)).unwrap();
            assert_eq!((found.uid(), found.gid()), (OWNER.uid, OWNER.gid), "{name:?}");
        }
    }

    // Others understand it, too.
    fs::write(by_tar.path().join("a.tar"), &archive).unwrap();
    tar(&["-xpf", "a.tar"], by_tar.path());
    fs::remove_file(by_tar.path().join("a.tar")).unwrap();
    assert_eq!(look(by_tar.path()), look(from.path()));
}

#[test]
fn a_file_is_packed_under_its_name_as_long_as_it_was() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("f");
    fs::write(&path, [1; 1000]).unwrap();
    let top = pack::Top::open(&path).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(600).unwrap();
    let archive = send(top);
    assert_eq!(archive.len(), 512 + 1024 + 1024);
    unpack(&directory.path().join("to"), &archive).unwrap();
    let unpacked = fs::read(directory.path().join("to/f")).unwrap();
    assert_eq!(unpacked, [[1; 600].as_slice(), &[0; 400]].concat());
}

#[test]
fn archives_of_others_are_understood() {
    for format in ["gnu", "pax", "v7", "ustar"] {
        let (from, to) = (sample(), tempdir().unwrap());
        if matches!(format, "v7" | "ustar") {
            fs::remove_dir_all(from.path().join("d".repeat(120))).unwrap();
        }
        fs::hard_link(from.path().join("large"), from.path().join("same")).unwrap();
        fs::set_permissions(from.path().join("run"), fs::Permissions::from_mode(0o6755)).unwrap();
        let out = tempdir().unwrap();
        let archive = out.path().join("a.tar");
        tar(&["-cf", archive.to_str().unwrap(), "--format", format, "."], from.path());
        // A byte at a time finds what is read twice, and too far.
        unpack_broken(to.path(), &fs::read(&archive).unwrap(), 977, None).unwrap();
        fs::set_permissions(from.path().join("run"), fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(look(to.path()), look(from.path()), "{format}");
        let inode = |name| fs::metadata(to.path().join(name)).unwrap().ino();
        assert_eq!(inode("large"), inode("same"));
        // Again over what is there.
        unpack(to.path(), &fs::read(&archive).unwrap()).unwrap();
        assert_eq!(look(to.path()), look(from.path()), "{format}");
    }
}

#[test]
fn nothing_leads_out_of_the_directory() {
    use EntryType::{Directory, Link, Symlink};
    let plain = |kind, name, link| entry(kind, name, link, 0o777, b"");
    let hostile: Vec<Vec<Vec<u8>>> = vec![
        vec![file("../secret", "stolen")],
        vec![file("a/../../secret", "stolen")],
        vec![file("OUTSIDE/secret", "stolen")],
        vec![plain(Symlink, "out", ".."), file("out/secret", "stolen")],
        vec![plain(Symlink, "out", "OUTSIDE"), file("out/secret", "stolen")],
        vec![plain(Symlink, "out", ".."), plain(Directory, "out/made/", "")],
        vec![plain(Symlink, "out", ".."), plain(Symlink, "out/made", "x")],
        vec![plain(Symlink, "a", "."), plain(Symlink, "a/b", "..")],
        vec![plain(Link, "mine", "../secret")],
        vec![plain(Link, "mine", "OUTSIDE/secret")],
        vec![plain(Symlink, "out", ".."), plain(Link, "mine", "out/secret")],
        vec![plain(Directory, "..", "")],
        vec![file("", "stolen")],
        vec![file(".", "stolen")],
    ];
    for (number, entries) in hostile.into_iter().enumerate() {
        let outside = tempdir().unwrap();
        fs::write(outside.path().join("secret"), "untouched").unwrap();
        let inside = outside.path().join("in");
        // In a path that is as long as what it stands for.
        let outside_path = outside.path().to_str().unwrap();
        let archive = entries.concat();
        let archive = replace(&archive, outside_path);
        let refused = unpack(&inside, &archive).unwrap_err();
        assert_eq!(reason(&refused), "INVALID_PATH", "{number}: {refused}");
        assert_eq!(fs::read(outside.path().join("secret")).unwrap(), b"untouched", "{number}");
        let mut left: Vec<_> =
            fs::read_dir(outside.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["in", "secret"], "{number}");
        assert!(!inside.join("mine").exists(), "{number}");
    }
}

/// Puts `path` where headers say `OUTSIDE`, and corrects their sums.
fn replace(archive: &[u8], path: &str) -> Vec<u8> {
    let mut replaced = Vec::new();
    for block in archive.chunks(512) {
        let mut header = Header::from_byte_slice(block).clone();
        let (name, link) = (header.path_bytes().into_owned(), header.as_old().linkname);
        if let Some(rest) = name.strip_prefix(b"OUTSIDE") {
            let name = [path.as_bytes(), rest].concat();
            header.as_old_mut().name[..name.len()].copy_from_slice(&name);
        }
        if let Some(rest) = link.strip_prefix(b"OUTSIDE") {
            let rest: Vec<u8> = rest.iter().copied().take_while(|byte| *byte != 0).collect();
            let link = [path.as_bytes(), &rest].concat();
            header.as_old_mut().linkname[..link.len()].copy_from_slice(&link);
        }
        if block.starts_with(b"OUTSIDE") || link.starts_with(b"OUTSIDE") {
            header.set_cksum();
        }
        replaced.extend_from_slice(header.as_bytes());
    }
    replaced
}

#[test]
fn what_is_in_the_way_is_replaced_and_never_written_through() {
    let directory = tempdir().unwrap();
    let (root, other) = (directory.path().join("root"), directory.path().join("other"));
    fs::create_dir_all(root.join("full/of")).unwrap();
    fs::create_dir(root.join("kept")).unwrap();
    fs::set_permissions(root.join("kept"), fs::Permissions::from_mode(0o711)).unwrap();
    fs::create_dir(&other).unwrap();
    fs::write(other.join("f"), "untouched").unwrap();
    symlink(other.join("f"), root.join("file")).unwrap();
    symlink(&other, root.join("directory")).unwrap();
    fs::hard_link(other.join("f"), root.join("hard")).unwrap();
    let archive = [
        file("file", "new"),
        file("hard", "new"),
        entry(EntryType::Directory, "directory/", "", 0o7755, b""),
        file("directory/f", "new"),
        entry(EntryType::Directory, "kept/", "", 0o755, b""),
        entry(EntryType::Fifo, "pipe", "", 0o644, b""),
    ];
    let done = unpack(&root, &archive.concat()).unwrap();
    assert_eq!(done.entries, 5);
    assert_eq!(fs::read(other.join("f")).unwrap(), b"untouched");
    for name in ["file", "hard", "directory/f"] {
        assert!(fs::symlink_metadata(root.join(name)).unwrap().is_file());
        assert_eq!(fs::read(root.join(name)).unwrap(), b"new");
        assert_eq!(fs::metadata(root.join(name)).unwrap().mtime(), 1_000_000_000);
    }
    let mode = |name| fs::symlink_metadata(root.join(name)).unwrap().mode() & 0o7777;
    assert_eq!((mode("directory"), mode("kept")), (0o755, 0o711));
    assert!(!root.join("pipe").exists());
    for kind in [EntryType::Regular, EntryType::Symlink] {
        let refused = unpack(&root, &entry(kind, "full", "x", 0o644, b"")).unwrap_err();
        assert_eq!(reason(&refused), "FILE_EXISTS");
    }
    let refused = unpack(&root, &file("file/in it", "x")).unwrap_err();
    assert_eq!(reason(&refused), "NOT_A_DIRECTORY");
    assert_eq!(reason(&unpack(&root.join("file"), &[]).unwrap_err()), "NOT_A_DIRECTORY");
    let found = look(&root);
    assert!(found.iter().all(|line| !line.contains(".oc-")), "{found:?}");
}

#[test]
fn a_stream_that_breaks_leaves_the_entries_before_it() {
    let archive = [file("whole", "content"), file("half", &"x".repeat(2000))].concat();
    let cut = &archive[..archive.len() - 1024];
    for (end, expected) in
        [(Some(Status::aborted("broken off")), tonic::Code::Aborted), (None, tonic::Code::InvalidArgument)]
    {
        let directory = tempdir().unwrap();
        let error = unpack_broken(directory.path(), cut, 100, end).unwrap_err();
        assert_eq!(error.code(), expected);
        assert_eq!(fs::read(directory.path().join("whole")).unwrap(), b"content");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
    // After the end, too.
    let directory = tempdir().unwrap();
    let whole = [archive, vec![0; 10_240]].concat();
    let error =
        unpack_broken(directory.path(), &whole, 512, Some(Status::aborted("broken off"))).unwrap_err();
    assert_eq!(error.code(), tonic::Code::Aborted);
}

#[test]
fn what_is_no_archive_is_refused() {
    let directory = tempdir().unwrap();
    let name = "n".repeat(2 << 20);
    let record = format!("{} path={name}\n", name.len() + 14);
    let bomb = entry(EntryType::XHeader, "x", "", 0o644, record.as_bytes());
    let gnu = entry(EntryType::GNULongName, "x", "", 0o644, name.as_bytes());
    let long =
        [entry(EntryType::GNULongName, "x", "", 0o644, "a/".repeat(3000).as_bytes()), file("x", "")].concat();
    let sparse = b"22 GNU.sparse.major=1\n";
    let sparse = [entry(EntryType::XHeader, "x", "", 0o644, sparse), file("x", "")].concat();
    let nowhere = entry(EntryType::Symlink, "x", "", 0o644, b"");
    for (archive, expected) in [
        (vec![7; 4096], "INVALID_ARGUMENT"),
        (bomb, "INVALID_ARGUMENT"),
        (gnu, "INVALID_ARGUMENT"),
        (sparse, "INVALID_ARGUMENT"),
        (nowhere, "INVALID_ARGUMENT"),
        (long, "INVALID_PATH"),
        (entry(EntryType::Link, "x", "none", 0o644, b""), "FILE_NOT_FOUND"),
    ] {
        let refused = unpack(directory.path(), &archive).unwrap_err();
        assert_eq!(reason(&refused), expected, "{refused}");
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    assert_eq!(unpack(directory.path(), &[]).unwrap(), WriteArchiveResponse::default());
}

fn run<T>(work: impl Future<Output = T>) -> T {
    runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

#[test]
fn an_archive_goes_through_the_service_both_ways() {
    let (from, to) = (sample(), tempdir().unwrap());
    let mut client = FileServiceClient::new(FileServiceServer::new(Files::default()));
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let request = oc_proto::v1::ReadArchiveRequest { path: path(from.path()), ..Default::default() };
    run(async {
        let parts = client.read_archive(request).await.unwrap().into_inner();
        let to_path = path(to.path());
        let upload = parts.map(move |part| WriteArchiveRequest {
            path: to_path.clone(),
            body: part.unwrap().body,
            ..Default::default()
        });
        let done = client.write_archive(upload).await.unwrap().into_inner();
        assert_eq!(done.entries, 11);
        assert_eq!(look(to.path()), look(from.path()));

        // A client that is not done is told at once.
        let head = WriteArchiveRequest {
            path: path(to.path()),
            body: Some(HttpBody { data: file("../x", "").into(), ..Default::default() }),
            ..Default::default()
        };
        let endless = stream::iter([head]).chain(stream::pending());
        let refused = client.write_archive(endless).await.unwrap_err();
        assert_eq!(reason(&refused), "INVALID_PATH");
        let none =
            oc_proto::v1::ReadArchiveRequest { path: path(&to.path().join("no")), ..Default::default() };
        assert_eq!(reason(&client.read_archive(none).await.unwrap_err()), "FILE_NOT_FOUND");
    });
}
