//! The commands, as a shell runs them, against a mesh without microVMs.

use std::process::{Command, Stdio};

use serde_json::json;

use crate::fake::{
    KEY,
    shell::{Shell, text},
};

#[test]
fn a_sandbox_is_created_shown_listed_and_killed() {
    let shell = Shell::new();
    let created = shell.json("create --timeout 0 --memory 2048 --env A=b=c --metadata who=me");
    let id = created["sandboxID"].as_str().unwrap();
    assert_eq!(created["status"], "running");
    assert_eq!(created["metadata"], json!({ "who": "me" }));
    {
        let state = shell.mesh.state.lock().unwrap();
        assert_eq!(state.created[0].timeout, Some(0));
        assert_eq!(state.created[0].memory_mb, 2048);
        assert_eq!(state.created[0].envs["A"], "b=c");
    }
    assert_eq!(shell.json(&format!("get {id}")), created);
    assert!(shell.ok(&format!("sandbox get {id}")).contains("status        running\n"));
    shell.ok("create");
    shell.ok("sandbox create");
    assert_eq!(shell.mesh.state.lock().unwrap().created[1].timeout, None);
    // Two pages.
    assert_eq!(shell.json("ls").as_array().unwrap().len(), 3);
    let table = shell.ok("sandbox list");
    assert!(table.starts_with("ID                       TEMPLATE  STATUS   CPU  MEM      AGE\n"), "{table}");
    assert_eq!(table.lines().count(), 4);
    shell.ok(&format!("sandbox set-timeout {id} 7"));
    assert_eq!(shell.json(&format!("get {id}"))["timeout"], 7);
    let stored = shell.json(&format!("sandbox hibernate {id}"));
    assert_eq!((&stored["sandboxID"], &stored["status"]), (&json!(id), &json!("hibernated")));
    let told = shell.ok(&format!("sandbox hibernate {id}"));
    assert!(told.contains("5 MiB") && told.contains("stored"), "{told}");
    assert_eq!(shell.json(&format!("sandbox wake {id}"))["startPath"], "memory");
    assert_eq!(shell.json(&format!("kill {id}")), json!({}));
    assert_eq!(shell.refused(&format!("get {id}")), (3, "SANDBOX_NOT_FOUND".to_owned()));
}

#[test]
fn errors_have_a_text_a_code_and_an_exit_code() {
    let shell = Shell::new();
    assert_eq!(shell.refused("create --template none"), (3, "TEMPLATE_NOT_FOUND".to_owned()));
    assert_eq!(shell.refused("create --template full"), (5, "NO_CAPACITY".to_owned()));
    assert_eq!(shell.refused("create --api-key wrong"), (3, "INVALID_CREDENTIALS".to_owned()));
    assert_eq!(shell.refused("create --cpu many"), (2, "USAGE".to_owned()));
    assert_eq!(shell.refused("ls --api-url http://127.0.0.1:9"), (5, "UNREACHABLE".to_owned()));
    assert_eq!(shell.refused("ls --api-url https://127.0.0.1:9"), (5, "UNREACHABLE".to_owned()));
    assert_eq!(shell.refused("ls --api-url ftp://localhost"), (2, "USAGE".to_owned()));
    assert_eq!(shell.refused("ls --api-url nonsense"), (2, "USAGE".to_owned()));
    let output = shell.run("create --template none");
    assert_eq!(text(&output.stderr), "error: there is no template none\ncode: TEMPLATE_NOT_FOUND\n");
    let output = shell.command("ls").env_remove("OC_API_KEY").output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("no API key"));
    assert_eq!(shell.run("ls --unknown").status.code(), Some(2));
}

#[test]
fn a_killed_sandbox_does_not_hide_another_that_is_not_there() {
    let shell = Shell::new();
    let id = shell.json("create")["sandboxID"].as_str().unwrap().to_owned();
    assert_eq!(shell.refused(&format!("kill sb-none {id}")), (3, "SANDBOX_NOT_FOUND".to_owned()));
    assert!(shell.mesh.state.lock().unwrap().sandboxes.is_empty());
}

#[test]
fn a_closed_pipe_is_no_panic() {
    let shell = Shell::new();
    let mut child =
        shell.command("completions bash").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(141), String::new()));
}

#[test]
fn keys_and_hosts_are_managed() {
    let shell = Shell::new();
    let created = shell.json("keys create --tenant t --admin --description for_ci");
    assert_eq!(created["apiKey"], KEY);
    assert_eq!(created["key"]["keyID"], "k1");
    assert_eq!(
        shell.ok("keys list"),
        "ID  TENANT  ADMIN  AGE  DESCRIPTION\nk1  t       yes         for_ci\n"
    );
    assert_eq!(shell.ok("keys create --tenant u"), format!("{KEY}\n"));
    shell.ok("keys delete k1");
    assert_eq!(shell.refused("keys delete k1"), (3, "KEY_NOT_FOUND".to_owned()));
    assert_eq!(shell.json("nodes")[0]["accelerator"], "tcg");
    assert!(shell.ok("nodes").contains("local  tcg          fake 1.0  0/10"));
}

#[test]
fn configuration_environment_and_exports() {
    let shell = Shell::new();
    let without = |line: &str| {
        let mut command = shell.command(line);
        command.env_remove("OC_API_URL").env_remove("OC_API_KEY");
        command
    };
    let set = |line: &str| assert!(without(line).status().unwrap().success(), "{line}");
    set(&format!("config set api-url http://{}", shell.mesh.address));
    set(&format!("config set api-key {KEY}"));
    assert!(without("ls").status().unwrap().success());
    let shown = text(&without("config show").output().unwrap().stdout);
    assert!(shown.contains("osb_0123…") && !shown.contains(KEY), "{shown}");
    assert_eq!(without("config set api-key short").status().unwrap().code(), Some(2));

    let script = format!(
        "{}\nprintf '%s %s' \"$OC_API_URL\" \"$OPENCOMPUTER_API_KEY\"",
        text(&without("env").output().unwrap().stdout)
    );
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    assert_eq!(text(&output.stdout), format!("http://{} {KEY}", shell.mesh.address));

    // The environment wins over the file.
    let output = without("ls --json").env("OPENCOMPUTER_API_KEY", "other").output().unwrap();
    assert!(text(&output.stderr).contains("INVALID_CREDENTIALS"));
}

#[test]
fn version_and_completions() {
    let shell = Shell::new();
    assert_eq!(shell.json("version")["version"], env!("CARGO_PKG_VERSION"));
    assert!(shell.ok("completions bash").contains("set-timeout"));
    assert!(shell.ok("--help").contains("Usage: oc"));
}
