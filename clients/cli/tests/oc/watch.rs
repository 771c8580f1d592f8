//! `oc watch`, against a mesh whose streams break.

use std::{
    io::{BufRead as _, BufReader},
    process::Stdio,
};

use serde_json::Value;

use crate::fake::shell::{Shell, text};

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_life_is_printed_once_however_often_the_stream_breaks() {
    let shell = Shell::new();
    let output = shell.run("watch sb-1 --json");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let events = lines(&text(&output.stdout));
    let seen: Vec<_> = events
        .iter()
        .map(|event| {
            (
                event["type"].as_str().unwrap(),
                event["previousState"].as_str().unwrap(),
                event["state"].as_str().unwrap(),
                event["revision"].as_u64().unwrap(),
            )
        })
        .collect();
    let expected = [
        ("created", "unspecified", "creating", 3),
        ("state_changed", "creating", "running", 5),
        ("updated", "running", "running", 7),
        ("state_changed", "running", "hibernating", 7),
        ("state_changed", "hibernating", "hibernated", 7),
        ("deleted", "hibernated", "deleted", 9),
    ];
    assert_eq!(seen, expected);
    assert_eq!(events[0]["sandbox"]["sandboxID"], "sb-1");
    let resumed: Vec<_> =
        shell.mesh.state.lock().unwrap().watched.iter().map(|one| one.after_revision).collect();
    assert_eq!(resumed, [0, 3, 5, 7]);
    assert!(text(&output.stderr).contains("try again; trying again"), "{}", text(&output.stderr));
}

#[test]
fn a_watch_begins_where_it_is_told_to() {
    let shell = Shell::new();
    let printed = shell.ok("watch sb-1 --after 7");
    assert_eq!(printed, "  sb-1  hibernated → deleted        9\n");
}

#[test]
fn what_cannot_be_resumed_is_an_error() {
    let shell = Shell::new();
    assert_eq!(shell.refused("watch sb-none"), (3, "SANDBOX_NOT_FOUND".to_owned()));
    assert_eq!(shell.refused("watch sb-old --after 3"), (3, "WATCH_COMPACTED".to_owned()));
    assert_eq!(shell.run("watch --after soon").status.code(), Some(2));
}

#[test]
fn ctrl_c_ends_a_watch_of_all() {
    let shell = Shell::new();
    let mut child = shell.command("watch --after 7").stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("hibernated → deleted"), "{line}");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
}
