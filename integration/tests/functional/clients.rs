//! Clients that are not ours, and our command line.

use std::{process::Command, sync::Arc};

use oc_integration::{
    mesh::{Mesh, succeeded},
    prepared,
};
use serde_json::{Value, json};

/// What users of the published packages write.
const PROGRAMS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/functional/clients");

/// Runs a program with a client that knows of this mesh what its environment says.
fn holds(mesh: &Mesh, interpreter: &str, program: &str) -> anyhow::Result<()> {
    let mut command = Command::new(prepared::tool(interpreter)?);
    command.arg(format!("{PROGRAMS}/{program}"));
    command.env("OPENCOMPUTER_API_URL", &mesh.url).env("OPENCOMPUTER_API_KEY", &mesh.key);
    succeeded(command).map(drop)
}

pub async fn the_published_python_client_works_unmodified(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    holds(&mesh, "python/bin/python3", "python.py")
}

pub async fn the_published_typescript_client_works_unmodified(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    holds(&mesh, "node/bin/node", "typescript.mjs")
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
