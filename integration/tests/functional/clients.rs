//! Clients that are not ours, and our command line.

use std::{process::Command, sync::Arc};

use oc_integration::{
    mesh::{Mesh, succeeded},
    prepared,
};
use serde_json::{Value, json};

/// What a user of the published package writes.
const PYTHON: &str = r#"
import asyncio
from opencomputer import Sandbox

async def main():
    sandbox = await Sandbox.create(template="base", timeout=120, envs={"A": "b"})
    assert sandbox.sandbox_id.startswith("sb-"), sandbox.sandbox_id
    result = await sandbox.exec.run("echo $A; echo err >&2; exit 3")
    assert (result.exit_code, result.stdout, result.stderr) == (3, "b\n", "err\n"), result
    await sandbox.files.write("dir/file.txt", "text")
    assert await sandbox.files.read("dir/file.txt") == "text"
    assert await sandbox.files.exists("dir/file.txt")
    assert not await sandbox.files.exists("dir/none")
    await sandbox.files.make_dir("made")
    names = sorted(entry.name for entry in await sandbox.files.list("/home/sandbox") if not entry.name.startswith("."))
    assert names == ["dir", "made"], names
    await sandbox.files.remove("dir")
    assert not await sandbox.files.exists("dir/file.txt")
    again = await Sandbox.connect(sandbox.sandbox_id)
    assert await again.is_running()
    await sandbox.set_timeout(60)
    await sandbox.hibernate()
    assert (await (await Sandbox.connect(sandbox.sandbox_id)).exec.run("echo $A")).stdout == "b\n"
    await sandbox.hibernate()
    await sandbox.wake(timeout=60)
    assert await sandbox.is_running()
    await sandbox.files.write("state", "one")
    taken = await sandbox.create_checkpoint("one")
    assert taken["status"] == "ready", taken
    await sandbox.files.write("state", "two")
    assert [one["name"] for one in await sandbox.list_checkpoints()] == ["one"]
    fork = await Sandbox.create_from_checkpoint(taken["id"], timeout=60, envs={"A": "c"})
    assert (await fork.exec.run("cat state; echo $A")).stdout == "onec\n"
    await fork.kill()
    await sandbox.restore_checkpoint(taken["id"])
    assert (await sandbox.exec.run("cat state")).stdout == "one"
    await sandbox.delete_checkpoint(taken["id"])
    await sandbox.delete_checkpoint(taken["id"])
    assert await sandbox.list_checkpoints() == []
    await sandbox.kill()
    print("done", sandbox.sandbox_id)

asyncio.run(main())
"#;

pub async fn the_published_python_client_works_unmodified(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let mut command = Command::new(prepared::tool("python/bin/python3")?);
    command.args(["-c", PYTHON]);
    command.env("OPENCOMPUTER_API_URL", &mesh.url).env("OPENCOMPUTER_API_KEY", &mesh.key);
    let said = succeeded(command)?;
    let id = said.trim().strip_prefix("done ").unwrap();
    assert_eq!(mesh.rest().sandbox(id).get().await?.json()["status"], "deleted");
    Ok(())
}

pub async fn oc_does_the_main_job(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let oc = |words: &[&str]| -> anyhow::Result<String> {
        let mut command = mesh.oc();
        command.args(words);
        succeeded(command)
    };
    let json = |text: String| -> anyhow::Result<Value> { Ok(serde_json::from_str(&text)?) };
    let created = json(oc(&["create", "--json", "--env", "A=b", "--metadata", "k=v"])?)?;
    let id = created["sandboxID"].as_str().unwrap();
    assert_eq!(oc(&["exec", id, "--wait", "--", "echo $A"])?, "b\n");
    let status = mesh.oc().args(["exec", id, "--wait", "--", "exit 7"]).status()?;
    assert_eq!(status.code(), Some(7));
    let tree = tempfile::tempdir()?;
    std::fs::create_dir(tree.path().join("tree"))?;
    std::fs::write(tree.path().join("tree/a"), "in the tree")?;
    let local = tree.path().join("tree").display().to_string();
    oc(&["files", "cp", "-r", &local, &format!("{id}:/home/sandbox/tree")])?;
    assert_eq!(oc(&["exec", id, "--wait", "--", "cat tree/a"])?, "in the tree");
    let back = tree.path().join("back").display().to_string();
    oc(&["files", "cp", "-r", &format!("{id}:tree"), &back])?;
    assert_eq!(std::fs::read_to_string(tree.path().join("back/a"))?, "in the tree");
    oc(&["files", "mkdir", id, "made"])?;
    let listed = json(oc(&["files", "ls", "--json", id])?)?;
    let names: Vec<_> =
        listed.as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap()).collect();
    assert!(names.contains(&"made") && names.contains(&"tree"), "{names:?}");
    oc(&["files", "rm", &format!("{id}:tree")])?;
    assert!(json(oc(&["ls", "--json"])?)?.to_string().contains(id));
    assert!(oc(&["get", id])?.contains("running"));
    assert!(oc(&["nodes"])?.contains(mesh.host_id()));
    let stored = json(oc(&["sandbox", "hibernate", id, "--json"])?)?;
    assert_eq!(stored["status"], "hibernated");
    assert!(oc(&["get", id])?.contains("hibernated"));
    assert!(oc(&["sandbox", "wake", id])?.contains("memory"));
    oc(&["sandbox", "hibernate", id])?;
    assert_eq!(oc(&["exec", id, "--wait", "--", "echo $A"])?, "b\n");
    let taken = json(oc(&["checkpoint", "create", id, "--name", "here", "--json"])?)?;
    let checkpoint = taken["id"].as_str().unwrap();
    oc(&["exec", id, "--wait", "--", "touch later"])?;
    assert!(oc(&["cp", "list", id, "--tree"])?.contains("here"));
    assert!(oc(&["cp", "fsck", checkpoint])?.contains("ok"));
    oc(&["checkpoint", "restore", id, checkpoint])?;
    assert_eq!(oc(&["exec", id, "--wait", "--", "ls later 2>/dev/null; echo back"])?, "back\n");
    let forks = json(oc(&["fork", id, "--count", "2", "--live", "--json"])?)?;
    let spawned = json(oc(&["cp", "spawn", checkpoint, "--env", "A=c", "--json"])?)?;
    let made = [&forks["sandboxes"][0], &forks["sandboxes"][1], &spawned["sandboxes"][0]];
    let made = made.map(|one| one["sandboxID"].as_str().unwrap());
    assert_eq!(
        made.map(|fork| oc(&["exec", fork, "--wait", "--", "echo $A"]).unwrap()),
        ["b\n", "b\n", "c\n"]
    );
    oc(&["cp", "delete", checkpoint])?;
    oc(&[["kill"].as_slice(), &made].concat())?;
    oc(&["kill", id])?;
    let gone = mesh.oc().args(["exec", id, "--json", "--wait", "--", "true"]).output()?;
    assert!(!gone.status.success());
    assert_eq!(serde_json::from_slice::<Value>(&gone.stderr)?["code"], json!("SANDBOX_DELETED"));
    Ok(())
}

pub async fn a_grpc_client_needs_no_proto_files(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let curl = |method: &str, data: &str| -> anyhow::Result<Value> {
        let mut command = Command::new(prepared::tool("python/bin/buf")?);
        command.args(["curl", "--protocol", "grpc", "--http2-prior-knowledge", "--data", data]);
        command.args(["--header", &format!("x-api-key: {}", mesh.key), &format!("{}/{method}", mesh.url)]);
        Ok(serde_json::from_str(&succeeded(command)?)?)
    };
    let health = curl("grpc.health.v1.Health/Check", "{}")?;
    assert_eq!(health["status"], "SERVING");
    let created = curl("oc.v1.SandboxService/CreateSandbox", r#"{"memoryMB": 1024}"#)?;
    let id = created["sandbox"]["sandboxID"].as_str().unwrap();
    let ran =
        curl("oc.v1.ExecService/Run", &format!(r#"{{"sandboxID": "{id}", "cmd": "printf 'a\\377'"}}"#))?;
    // Bytes are bytes here.
    assert_eq!(ran["stdout"], "Yf8=");
    curl("oc.v1.SandboxService/DeleteSandbox", &format!(r#"{{"sandboxID": "{id}"}}"#))?;
    Ok(())
}
