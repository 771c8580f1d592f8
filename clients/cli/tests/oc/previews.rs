//! `oc preview`, as a shell runs it, against a mesh without microVMs.

use serde_json::{Value, json};

use crate::fake::{
    previews::MADE_TOKEN,
    shell::{Shell, text},
};

const OWN_TOKEN: &str = "own-0123456789abcdef";

/// ID of a new sandbox.
fn sandbox(shell: &Shell) -> String {
    shell.json("create")["sandboxID"].as_str().unwrap().to_owned()
}

#[test]
fn a_preview_is_created_listed_and_deleted() {
    let shell = Shell::new();
    let id = sandbox(&shell);
    let host = |port: u16| format!("{id}-p{port}.preview.localhost");
    assert_eq!(shell.json(&format!("preview list {id}")), json!([]));
    // The URL alone, for `$(…)`.
    let output = shell.run(&format!("preview create {id} --port 8000"));
    assert_eq!(text(&output.stdout), format!("http://{}:8080\n", host(8000)));
    assert_eq!(text(&output.stderr), "");
    let made = shell.json(&format!("preview create {id} --port 3000 --domain app.example.com"));
    assert_eq!((&made["port"], &made["hostname"]), (&json!(3000), &json!(host(3000))));
    assert_eq!((&made["customHostname"], &made["sandboxId"]), (&json!("app.example.com"), &json!(id)));
    // It is there already.
    assert_eq!(shell.json(&format!("preview create {id} --port 3000"))["id"], made["id"]);
    let listed = shell.json(&format!("preview ls {id}"));
    let ports: Vec<_> = listed.as_array().unwrap().iter().map(|preview| &preview["port"]).collect();
    assert_eq!(ports, [&json!(8000), &json!(3000)]);
    let table = shell.ok(&format!("preview list {id}"));
    let rows: Vec<Vec<_>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["PORT", "HOSTNAME", "SSL", "AUTH", "AGE"]);
    assert_eq!(rows[1][..4], ["8000", &host(8000), "none", "none"]);
    assert_eq!(rows[2][..4], ["3000", "app.example.com", "none", "none"]);

    let other = sandbox(&shell);
    let taken = format!("preview create {other} --port 80 --domain app.example.com");
    assert_eq!(shell.refused(&taken), (4, "DOMAIN_TAKEN".into()));
    assert_eq!(shell.json(&format!("preview list {other}")), json!([]));

    assert_eq!(shell.ok(&format!("preview delete {id} 8000")), "");
    assert_eq!(shell.json(&format!("preview rm {id} 3000")), json!({}));
    assert_eq!(shell.json(&format!("preview list {id}")), json!([]));
    assert_eq!(shell.refused(&format!("preview delete {id} 3000")), (3, "PREVIEW_NOT_FOUND".into()));
}

#[test]
fn a_token_is_shown_once_beside_what_is_asked_for() {
    let shell = Shell::new();
    let id = sandbox(&shell);
    let given = || shell.mesh.state.lock().unwrap().preview_tokens.get(&id).cloned();
    let scheme = || {
        let listed = shell.json(&format!("preview list {id}"));
        assert!(!listed.to_string().contains("0123456789abcdef"), "{listed}");
        listed[0]["authConfig"]["scheme"].as_str().unwrap_or_default().to_owned()
    };
    let output = shell.run(&format!("preview create {id} --port 8000 --auth"));
    assert_eq!(text(&output.stdout), format!("http://{id}-p8000.preview.localhost:8080\n"));
    assert!(text(&output.stderr).contains(&format!("\n{MADE_TOKEN}\n")), "{}", text(&output.stderr));
    assert_eq!((given().as_deref(), scheme().as_str()), (Some(MADE_TOKEN), "bearer"));
    let table = shell.ok(&format!("preview list {id}"));
    assert!(table.lines().nth(1).unwrap().contains("  bearer  "), "{table}");
    let made = shell.json(&format!("preview create {id} --port 8000 --auth {OWN_TOKEN}"));
    assert_eq!((&made["previewAuthToken"], given().as_deref()), (&json!(OWN_TOKEN), Some(OWN_TOKEN)));
    // Without the flag it stays, and is not shown again.
    let output = shell.run(&format!("preview create {id} --port 8001"));
    assert_eq!((text(&output.stderr).as_str(), given().as_deref()), ("", Some(OWN_TOKEN)));

    let output = shell.run(&format!("preview rotate-auth {id}"));
    assert_eq!((text(&output.stdout), given().as_deref()), (format!("{MADE_TOKEN}\n"), Some(MADE_TOKEN)));
    assert!(text(&output.stderr).contains("shown only now"));
    let rotated = shell.json(&format!("preview rotate-auth {id}"));
    assert_eq!(rotated, json!({ "previewAuthToken": MADE_TOKEN, "scheme": "bearer" }));
    let output = shell.run(&format!("preview rotate-auth {id} --remove"));
    assert!(output.status.success());
    assert_eq!((text(&output.stdout).trim(), text(&output.stderr).as_str()), ("", ""));
    assert_eq!((given(), scheme().as_str()), (None, ""));
    let removed: Value = shell.json(&format!("preview rotate-auth {id} --remove"));
    assert_eq!(removed["previewAuthToken"].as_str().unwrap_or_default(), "");
}

#[test]
fn what_names_no_port_or_no_sandbox_is_refused() {
    let shell = Shell::new();
    let id = sandbox(&shell);
    for line in [
        format!("preview create {id} --port 0"),
        format!("preview create {id} --port 65536"),
        format!("preview create {id} --port http"),
        format!("preview create {id}"),
        format!("preview delete {id} 0"),
        format!("preview delete {id}"),
    ] {
        assert_eq!(shell.refused(&line), (2, "USAGE".into()), "{line}");
    }
    for command in ["create sb-none --port 80", "list sb-none", "delete sb-none 80", "rotate-auth sb-none"] {
        assert_eq!(
            shell.refused(&format!("preview {command}")),
            (3, "SANDBOX_NOT_FOUND".into()),
            "{command}"
        );
    }
    assert!(shell.mesh.state.lock().unwrap().previews.is_empty());
}

#[test]
fn help_and_completions_know_the_commands() {
    let shell = Shell::new();
    let help = shell.ok("preview --help");
    for command in ["create", "list", "delete", "rotate-auth"] {
        assert!(help.contains(&format!("\n  {command} ")), "{command}: {help}");
        shell.ok(&format!("preview {command} --help"));
    }
    assert!(shell.ok("completions bash").contains("oc__subcmd__preview"));
}
