//! Files in and out.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use oc_integration::{
    mesh::{Mesh, PATIENCE},
    processes,
};
use oc_proto::v1::{FileEventType, WatchDirectoryRequest, file_service_client::FileServiceClient};
use reqwest::Method;
use serde_json::json;
use tokio::time::timeout;
use tonic::Request;

const MIB: usize = 1 << 20;
/// What none of our processes takes while a large file passes (the bound for the bench).
const SMALL_MIB: u64 = 64;

/// Bytes that do not repeat in any way that a block could be mistaken for another.
fn noise(length: usize) -> Bytes {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(length).collect()
}

pub async fn a_file_comes_back_as_it_went(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let sandbox = mesh.rest().create(json!({})).await?;
    for length in [0, 1, 4095, 512 << 10, (512 << 10) + 1, 5 * MIB + 17] {
        let content = noise(length);
        sandbox.put("f", content.clone()).await?.expect(204)?;
        assert_eq!(sandbox.run("stat -c '%s %U %a' f").await?, format!("{length} sandbox 644\n"));
        let back = sandbox.read("f").await?.expect(200)?;
        assert!(back.body == content, "{length} bytes did not come back");
        assert_eq!(back.headers["content-type"], "application/octet-stream");
    }
    // Any part of it.
    let part = sandbox.file(Method::GET, "/files", "f").query(&[("offset", "1048570"), ("limit", "12")]);
    let part = part.send().await?.bytes().await?;
    assert_eq!(part, noise(5 * MIB + 17).slice(1_048_570..1_048_582));
    // A file that is replaced keeps its owner and mode; one that is read while it is replaced stays what it was.
    sandbox.run("echo old > tool; chmod 755 tool; sudo chown root tool; exec 3< tool; sleep 0.1").await?;
    sandbox.put("tool", "new").await?.expect(204)?;
    assert_eq!(sandbox.run("stat -c '%U %a' tool; cat tool").await?, "root 755\nnew");
    // Names are bytes to the guest, text to REST.
    sandbox.put("ключ/日本 +%&#.txt", "x").await?.expect(204)?;
    assert_eq!(sandbox.run("cat 'ключ/日本 +%&#.txt'").await?, "x");
    sandbox.delete().await
}

pub async fn a_large_file_streams_through_small_processes(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let sandbox = mesh.rest().create(json!({})).await?;
    let piece = noise(MIB);
    let pieces = stream::iter(std::iter::repeat_n(piece.clone(), 100)).map(Ok::<_, std::io::Error>);
    sandbox.put("large", reqwest::Body::wrap_stream(pieces)).await?.expect(204)?;
    let mut whole = Vec::new();
    for _ in 0..100 {
        whole.extend_from_slice(&piece);
    }
    let back = sandbox.read("large").await?.expect(200)?;
    assert!(back.body == whole, "100 MiB did not come back");
    for service in ["gateway", "vmm-agent", "scheduler"] {
        let peak = processes::memory_kib(mesh.pid(service)?, "status", "VmHWM").unwrap() >> 10;
        assert!(peak < SMALL_MIB, "{service} took {peak} MiB");
    }
    let guest = sandbox.run_as_root("awk '/VmHWM/ {print int($2 / 1024)}' /proc/1/status").await?;
    assert!(guest.trim().parse::<u64>()? < SMALL_MIB, "the guest's first process took {guest} MiB");
    sandbox.delete().await
}

pub async fn readers_that_stand_still_hold_up_nobody(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let (read, other) = (mesh.rest().create(json!({})).await?, mesh.rest().create(json!({})).await?);
    read.run("head -c 20000000 /dev/urandom > large").await?;
    let mut still = Vec::new();
    for _ in 0..6 {
        still.push(read.file(Method::GET, "/files", "large").send().await?);
    }
    // Until every window on the way is full.
    tokio::time::sleep(Duration::from_secs(2)).await;
    for sandbox in [&other, &read] {
        assert_eq!(sandbox.run("seq 100000 | tail -1").await?, "100000\n");
        assert!(sandbox.read("/usr/bin/python3").await?.expect(200)?.body.len() > MIB);
    }
    // And those that read on have all of it.
    for reader in still {
        assert_eq!(reader.bytes().await?.len(), 20_000_000);
    }
    read.delete().await?;
    other.delete().await
}

pub async fn a_broken_upload_leaves_what_was_there(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let sandbox = mesh.rest().create(json!({})).await?;
    sandbox.put("kept", "before").await?.expect(204)?;
    let broken = stream::iter([Ok(noise(MIB)), Err(std::io::Error::other("the client is gone"))]);
    assert!(sandbox.put("kept", reqwest::Body::wrap_stream(broken)).await.is_err());
    oc_integration::mesh::eventually("the half is removed", async || {
        anyhow::ensure!(sandbox.run("ls -A | grep -c '^.oc-' || true").await? == "0\n");
        Ok(())
    })
    .await?;
    assert_eq!(sandbox.run("head -c 100 kept | base64").await?, "YmVmb3Jl\n", "before");
    sandbox.delete().await
}

pub async fn directories_are_made_listed_moved_and_removed(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let rest = mesh.rest();
    let sandbox = rest.create(json!({})).await?;
    sandbox.files(Method::POST, "/files/mkdir", "a/b/c").await?.expect(204)?;
    sandbox.files(Method::POST, "/files/mkdir", "a/b/c").await?.expect(204)?;
    sandbox.put("a/one", "1").await?.expect(204)?;
    sandbox.run("ln -s one a/link; mkfifo a/pipe; touch \"a/$(printf 'bad\\377')\"").await?;
    let listed = sandbox.files(Method::GET, "/files/list", "a").await?.expect(200)?.json();
    let entries: Vec<_> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| (entry["name"].as_str().unwrap(), entry["isDir"].as_bool().unwrap()))
        .collect();
    assert_eq!(
        entries,
        [("b", true), ("bad\u{fffd}", false), ("link", false), ("one", false), ("pipe", false)]
    );
    let stat = sandbox.files(Method::GET, "/files/stat", "a/link").await?.expect(200)?.json();
    assert_eq!((&stat["linkTarget"], &stat["path"]), (&json!("one"), &json!("/home/sandbox/a/link")));
    // A pipe that nobody writes into holds nobody up.
    assert_eq!(sandbox.read("a/pipe").await?.refusal(), (400, "NOT_A_FILE".into()));
    rest.post(&sandbox.path("/files/rename"), json!({ "from": "a/one", "to": "two" })).await?.expect(204)?;
    assert_eq!(sandbox.run("cat two").await?, "1");
    sandbox.files(Method::DELETE, "/files", "a").await?.expect(204)?;
    assert_eq!(
        sandbox.files(Method::GET, "/files/list", "a").await?.refusal(),
        (404, "FILE_NOT_FOUND".into())
    );
    assert_eq!(sandbox.files(Method::GET, "/files/list", "/home").await?.json()[0]["name"], "sandbox");
    sandbox.delete().await
}

pub async fn a_full_disk_is_told_and_is_left(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let sandbox = mesh.rest().create(json!({})).await?;
    // All but 3 MiB; nothing of it is written on the host.
    sandbox
        .run_as_root("fallocate -l $(( ($(df --output=avail -B1 / | tail -1) - 3145728) )) /ballast")
        .await?;
    assert_eq!(sandbox.put("large", noise(8 * MIB)).await?.refusal(), (507, "GUEST_DISK_FULL".into()));
    assert_eq!(sandbox.run("ls -A | grep -c -e large -e '^.oc-' || true").await?, "0\n", "no half is left");
    sandbox.run("echo works").await?;
    sandbox.run_as_root("rm /ballast").await?;
    sandbox.put("large", noise(8 * MIB)).await?.expect(204)?;
    sandbox.delete().await
}

pub async fn a_tree_comes_back_as_an_archive(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let sandbox = mesh.rest().create(json!({})).await?;
    let make = "long=d/$(printf 'n%.0s' $(seq 200)) && mkdir -p tree/empty tree/$long && cd tree && echo a > d/a && chmod 4750 d/a &&
        ln -s d/a link && ln -s /nowhere dangling && touch -d '2001-02-03 04:05:06' d/old && mkfifo left-out &&
        head -c 3000000 /dev/urandom > $long/big";
    sandbox.run(make).await?;
    let archive = sandbox.files(Method::GET, "/files/archive", "tree").await?.expect(200)?;
    // No browser is to take what is in a sandbox for something.
    assert_eq!(archive.headers["content-type"], "application/octet-stream");
    let put = async |path: &str, body: Bytes| {
        mesh.rest().send(sandbox.file(Method::PUT, "/files/archive", path).body(body)).await
    };
    let unpacked = put("copy/of/it", archive.body.clone()).await?.expect(200)?.json();
    assert_eq!(unpacked["bytes"], 3_000_002, "{unpacked}");
    sandbox.run("rm tree/left-out && diff -r --no-dereference tree copy/of/it").await?;
    let facts =
        "cd copy/of/it && readlink link dangling && stat -c '%a %U' d/a && stat -c %Y d/old && ls -d empty";
    assert_eq!(sandbox.run(facts).await?, "d/a\n/nowhere\n750 sandbox\n981173106\nempty\n");
    // The guest's own tar reads it, too.
    sandbox.put("a.tar", archive.body.clone()).await?.expect(204)?;
    sandbox.run("mkdir x && tar -x -C x -f a.tar && diff -r --no-dereference tree x").await?;
    // What breaks off leaves what came before.
    let half = archive.body.slice(..archive.body.len() / 2);
    assert_eq!(put("half", half).await?.status, 400);
    assert_eq!(put("none", Bytes::from_static(&[b'x'; 2048])).await?.status, 400);
    sandbox.delete().await
}

pub async fn what_happens_in_a_directory_is_told(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let sandbox = mesh.rest().create(json!({})).await?;
    sandbox.run("mkdir -p watched/deep && echo > watched/deep/f").await?;
    let mut client = FileServiceClient::connect(mesh.url.clone()).await?;
    let (sandbox_id, path) = (sandbox.id.clone(), "watched".to_owned());
    let mut request = Request::new(WatchDirectoryRequest { sandbox_id, path, recursive: true });
    request.metadata_mut().insert("x-api-key", mesh.key.parse()?);
    let mut events = client.watch_directory(request).await?.into_inner();
    let mut next = async || -> anyhow::Result<(FileEventType, String, String)> {
        let event = timeout(PATIENCE, events.message()).await??.context("it has ended")?;
        let short = |path: &str| path.replace("/home/sandbox/watched", "");
        Ok((event.r#type(), short(&event.path), short(&event.renamed_from)))
    };
    let is = |kind, path: &str, from: &str| (kind, path.to_owned(), from.to_owned());
    assert_eq!(next().await?.0, FileEventType::Unspecified);
    sandbox.run("mkdir watched/new").await?;
    // It is watched, too, when it is told.
    assert_eq!(next().await?, is(FileEventType::Created, "/new", ""));
    sandbox.run("cd watched && echo x > new/file && mv new/file deep/moved && rm deep/f").await?;
    assert_eq!(next().await?, is(FileEventType::Created, "/new/file", ""));
    assert_eq!(next().await?, is(FileEventType::Modified, "/new/file", ""));
    assert_eq!(next().await?, is(FileEventType::Renamed, "/deep/moved", "/new/file"));
    assert_eq!(next().await?, is(FileEventType::Removed, "/deep/f", ""));
    // It ends with its directory.
    sandbox.run("rm -r watched").await?;
    while next().await.is_ok() {}
    sandbox.delete().await
}
