//! `oc agent`, against a mesh whose streams break after every other event.

use std::{
    io::{BufRead as _, BufReader},
    process::Stdio,
};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::fake::shell::{Shell, signal, text};

const SAID: &str = "[conversation c1, model m1]\nabout tea\n> Bash: ls\n[success, 1 turns]\n";

#[test]
fn an_agent_is_followed_until_it_has_done_what_it_was_told() {
    let shell = Shell::new();
    let line =
        "agent start sb-1 --prompt tea --model m1 --allowed-tools a,b --max-turns 3 --env K=v --resume c0";
    let output = shell.run(line);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), SAID);
    let state = shell.mesh.state.lock().unwrap();
    let request = &state.agents_started[0];
    assert_eq!((request.prompt.as_str(), request.model.as_deref()), ("tea", Some("m1")));
    assert_eq!(
        (request.allowed_tools.as_slice(), request.max_turns),
        (["a".to_owned(), "b".to_owned()].as_slice(), Some(3))
    );
    assert_eq!((request.envs["K"].as_str(), request.resume.as_str()), ("v", "c0"));
    // It went on after each stream that broke, and is ended in the end.
    assert!(state.agents_attached.len() > 2 && state.agents_attached.is_sorted());
    assert_eq!(state.sessions.all[0].signals, [9]);
}

#[test]
fn events_are_passed_on_as_they_are() {
    let shell = Shell::new();
    let output = shell.ok("agent start sb-1 --prompt tea --json");
    let types: Vec<_> = output
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["type"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(types, ["ready", "system", "assistant", "result", "turn_complete"]);
}

#[test]
fn an_agent_that_is_kept_is_told_more() {
    let shell = Shell::new();
    let output = shell.run("agent start sb-1 --prompt tea --keep");
    assert!(text(&output.stderr).contains("`oc agent prompt sb-1 s1 TEXT`"), "{}", text(&output.stderr));
    assert_eq!(text(&shell.run("agent prompt sb-1 s1 tea").stdout), SAID);
    shell.ok("agent prompt sb-1 s1 more --detach");
    assert_eq!(shell.mesh.state.lock().unwrap().told, ["tea", "more"]);
    assert!(shell.ok("agent list sb-1").contains("s1  running"));
    shell.ok("agent interrupt sb-1 s1");
    shell.ok("agent kill sb-1 s1 --signal TERM");
    assert_eq!(shell.json("agent ls sb-1")[0]["exitCode"], 143);
    let output = shell.run("agent attach sb-1 s1");
    assert_eq!(output.status.code(), Some(143));
    assert!(text(&output.stdout).contains("about tea") && text(&output.stdout).contains("about more"));
}

#[test]
fn an_agent_without_a_prompt_waits() {
    let shell = Shell::new();
    assert_eq!(shell.ok("agent start sb-1"), "s1\n");
    assert_eq!(shell.json("agent start sb-1 --prompt x --detach")["sessionID"], "s2");
    assert!(shell.mesh.session("s1", |session| session.exit.is_none()));
}

#[test]
fn an_agent_that_fails_or_ends_is_a_failure() {
    let shell = Shell::new();
    let output = shell.run("agent start sb-1 --prompt fail");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains("[error: no key]"));
    assert_eq!(shell.run("agent start sb-1 --prompt die").status.code(), Some(3));
    assert_eq!(shell.refused("agent start sb-bare --prompt x"), (3, "AGENT_NOT_INSTALLED".to_owned()));
    assert_eq!(shell.refused("agent prompt sb-1 none x"), (3, "SESSION_NOT_FOUND".to_owned()));
}

#[test]
fn ctrl_c_stops_what_an_agent_is_doing() {
    let shell = Shell::new();
    let mut child = shell
        .command("agent start sb-1 --prompt hang --keep")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("Bash")));
    signal(&child, Signal::SIGINT);
    assert_eq!(lines.next().unwrap().unwrap(), "[interrupted]");
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(shell.mesh.state.lock().unwrap().told, ["interrupt"]);
}
