//! `oc checkpoint` and `oc fork`, as a shell runs them, against a mesh without microVMs.

use oc_proto::v1::{CheckpointKind, CheckpointState, ForkMode, RetentionMode};
use serde_json::{Value, json};

use crate::fake::shell::{Shell, text};

/// ID of a new sandbox.
fn sandbox(shell: &Shell) -> String {
    shell.json("create --metadata who=me")["sandboxID"].as_str().unwrap().to_owned()
}

/// ID of a new checkpoint.
fn checkpoint(shell: &Shell, sandbox: &str, name: &str) -> String {
    let taken = shell.json(&format!("checkpoint create {sandbox} --name {name}"));
    taken["id"].as_str().unwrap().to_owned()
}

#[test]
fn a_checkpoint_is_taken_shown_listed_and_deleted() {
    let shell = Shell::new();
    let sandbox = sandbox(&shell);
    let first = shell.json(&format!("checkpoint create {sandbox} --name first"));
    let id = first["id"].as_str().unwrap();
    assert_eq!((&first["kind"], &first["status"]), (&json!("full"), &json!("ready")));
    assert_eq!(first["sandboxId"], sandbox);
    let line = "--kind disk-only --retention-policy delete-oldest --retention-max-count 3";
    let shown = shell.ok(&format!("cp create {sandbox} --name second {line}"));
    assert!(shown.contains("name            second\n"), "{shown}");
    assert!(shown.contains(&format!("parent          {id}\n")), "{shown}");
    assert!(shown.contains("disk changed    0.5MiB\n") && shown.contains("12.3 ms\n"), "{shown}");
    {
        let state = shell.mesh.state.lock().unwrap();
        assert_eq!(state.taken[0].kind(), CheckpointKind::Full);
        assert_eq!(state.taken[0].retention_policy.unwrap().mode(), RetentionMode::None);
        assert_eq!(state.taken[1].kind(), CheckpointKind::DiskOnly);
        let policy = state.taken[1].retention_policy.unwrap();
        assert_eq!((policy.mode(), policy.max_count), (RetentionMode::DeleteOldest, 3));
    }
    assert_eq!(shell.json(&format!("checkpoint get {id}")), first);
    checkpoint(&shell, &self::sandbox(&shell), "first");
    assert_eq!(shell.json(&format!("checkpoint list {sandbox}")).as_array().unwrap().len(), 2);
    assert_eq!(shell.json("cp ls").as_array().unwrap().len(), 3);
    let table = shell.ok(&format!("checkpoint list {sandbox}"));
    assert!(table.starts_with("ID                       NAME    KIND "), "{table}");
    assert!(table.contains(&format!("{id}  first   full       ready   7.0MiB  4.5MiB   2023-11")), "{table}");
    assert_eq!(
        shell.refused(&format!("checkpoint create {sandbox} --name first")),
        (4, "CHECKPOINT_EXISTS".into())
    );
    assert_eq!(shell.refused("cp create sb-none --name a"), (3, "SANDBOX_NOT_FOUND".into()));
    // The one that is not there keeps none of the others.
    let rest = "cp-00000000000000000002 cp-00000000000000000001";
    assert_eq!(shell.refused(&format!("cp delete cp-none {rest}")), (3, "CHECKPOINT_NOT_FOUND".into()));
    assert_eq!(shell.json(&format!("cp rm {id}")), json!({}));
    assert_eq!(shell.json("cp ls"), json!([]));
    assert_eq!(shell.refused(&format!("cp get {id}")), (3, "CHECKPOINT_NOT_FOUND".into()));
}

#[test]
fn checkpoints_are_drawn_as_a_tree() {
    let shell = Shell::new();
    let sandbox = sandbox(&shell);
    let ids = ["a", "b", "c", "d"].map(|name| checkpoint(&shell, &sandbox, name));
    {
        // Back to the first, and on from there.
        let mut state = shell.mesh.state.lock().unwrap();
        state.checkpoints[3].parent_id.clone_from(&ids[0]);
    }
    let names = |tree: &str| -> Vec<String> {
        tree.lines().skip(1).map(|line| line.split("  cp-").next().unwrap().trim_end().to_owned()).collect()
    };
    let tree = shell.ok(&format!("checkpoint list {sandbox} --tree"));
    assert_eq!(names(&tree), ["a", "├─ b", "│  └─ c", "└─ d"]);
    assert!(tree.lines().nth(2).unwrap().contains("4.0MiB          0.5MiB"), "{tree}");
    // A mesh that says what cannot be.
    shell.mesh.state.lock().unwrap().checkpoints[0].parent_id.clone_from(&ids[2]);
    assert_eq!(names(&shell.ok("checkpoint list --tree")), ["a", "├─ b", "│  └─ c", "└─ d"]);
    assert_eq!(shell.json("checkpoint list --tree").as_array().unwrap().len(), 4);
}

#[test]
fn a_sandbox_goes_back_to_a_checkpoint() {
    let shell = Shell::new();
    let sandbox = sandbox(&shell);
    let checkpoint = checkpoint(&shell, &sandbox, "a");
    let restored = shell.json(&format!("checkpoint restore {sandbox} {checkpoint}"));
    assert_eq!((&restored["sandboxID"], &restored["startPath"]), (&json!(sandbox), &json!("restored")));
    assert!(shell.ok(&format!("cp restore {sandbox} {checkpoint}")).contains("restored\n"));
    assert_eq!(
        shell.refused(&format!("cp restore {sandbox} cp-none")),
        (3, "CHECKPOINT_NOT_FOUND".to_owned())
    );
}

#[test]
fn sandboxes_are_made_of_a_checkpoint() {
    let shell = Shell::new();
    let sandbox = sandbox(&shell);
    let checkpoint = checkpoint(&shell, &sandbox, "a");
    let flags = "--count 3 --live --timeout 0 --env A=b=c --metadata k=v";
    let spawned = shell.json(&format!("checkpoint spawn {checkpoint} {flags}"));
    assert_eq!(spawned["sandboxes"].as_array().unwrap().len(), 3);
    assert_eq!(spawned["sandboxes"][0], spawned["sandbox"]);
    let first = spawned["sandbox"]["sandboxID"].as_str().unwrap();
    assert!(shell.ok(&format!("get {first}")).contains(&format!("from checkpoint  {checkpoint}\n")));
    let table = shell.ok(&format!("fork {checkpoint}"));
    assert!(table.starts_with("ID                       TEMPLATE  STATUS   CPU  MEM      AGE\n"), "{table}");
    assert_eq!(table.lines().count(), 2);
    {
        let state = shell.mesh.state.lock().unwrap();
        let [spawned, forked] = state.forked_checkpoints.as_slice() else { panic!("not two") };
        assert_eq!((spawned.count, spawned.mode(), spawned.timeout), (Some(3), ForkMode::Live, Some(0)));
        assert_eq!((spawned.envs["A"].as_str(), spawned.metadata["k"].as_str()), ("b=c", "v"));
        assert_eq!((forked.count, forked.mode(), forked.timeout), (None, ForkMode::Cold, None));
        assert!(state.forked_sandboxes.is_empty());
    }
    let disk = shell.json(&format!("cp create {sandbox} --name disk --kind disk-only"));
    let refused = shell.refused(&format!("fork {} --live", disk["id"].as_str().unwrap()));
    assert_eq!(refused, (3, "CHECKPOINT_HAS_NO_MEMORY".to_owned()));
}

#[test]
fn sandboxes_are_made_of_a_sandbox() {
    let shell = Shell::new();
    let sandbox = sandbox(&shell);
    let output = shell.run(&format!("fork {sandbox} --count 2"));
    assert!(output.status.success());
    assert!(text(&output.stdout).starts_with("ID                       TEMPLATE "));
    assert_eq!(text(&output.stdout).lines().count(), 3);
    assert_eq!(text(&output.stderr), format!("{sandbox}: pause 12.3 ms, freeze 6.8 ms\n"));
    let output = shell.run(&format!("fork {sandbox} --live --env A=b --metadata k=v --timeout 9 --json"));
    assert_eq!(text(&output.stderr), "");
    let forked: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&forked["pauseUs"], &forked["freezeUs"]), (&json!(12_345), &json!(6_780)));
    assert_eq!(forked["sandboxes"][0]["forkedFrom"], sandbox);
    {
        let state = shell.mesh.state.lock().unwrap();
        let [cold, live] = state.forked_sandboxes.as_slice() else { panic!("not two") };
        assert_eq!((cold.count, cold.mode(), cold.timeout), (Some(2), ForkMode::Cold, None));
        assert_eq!((live.count, live.mode(), live.timeout), (None, ForkMode::Live, Some(9)));
        assert_eq!((live.envs["A"].as_str(), live.metadata["k"].as_str()), ("b", "v"));
        assert!(state.forked_checkpoints.is_empty());
    }
    assert_eq!(shell.refused("fork sb-none"), (3, "SANDBOX_NOT_FOUND".to_owned()));
    assert_eq!(shell.refused(&format!("fork {sandbox} --count 65")), (2, "USAGE".to_owned()));
}

#[test]
fn damaged_checkpoints_hide_none_of_the_others() {
    let shell = Shell::new();
    let sandbox = sandbox(&shell);
    let [damaged, good] = ["damaged", "good"].map(|name| checkpoint(&shell, &sandbox, name));
    assert_eq!(
        shell.ok(&format!("checkpoint fsck {good}")),
        format!("ID                       RESULT  READ    UPLOADED  ERROR\n{good}  ok      7.0MiB  2.0MiB\n")
    );
    let output = shell.run(&format!("checkpoint fsck {damaged} {good} --json"));
    assert_eq!(output.status.code(), Some(5));
    let verdicts: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        verdicts,
        json!([
            {
                "id": damaged,
                "ok": false,
                "error": "disk.img: chunk 3 has another digest",
                "code": "CHECKPOINT_DAMAGED",
            },
            { "id": good, "ok": true, "verifiedBytes": 7 << 20, "uploadedBytes": 2 << 20 },
        ])
    );
    let error: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(error["code"], "CHECKPOINT_DAMAGED");
    assert_eq!(shell.refused(&format!("cp fsck {good} cp-none")), (3, "CHECKPOINT_NOT_FOUND".to_owned()));
}

#[test]
fn all_checkpoints_are_verified_but_those_that_are_being_taken() {
    let shell = Shell::new();
    assert_eq!(shell.json("checkpoint fsck --all"), json!([]));
    let sandbox = sandbox(&shell);
    let [_, processing] = ["good", "processing"].map(|name| checkpoint(&shell, &sandbox, name));
    let set = |position: usize, state: CheckpointState| {
        shell.mesh.state.lock().unwrap().checkpoints[position].state = state.into();
    };
    set(1, CheckpointState::Processing);
    assert_eq!(shell.json("cp fsck --all").as_array().unwrap().len(), 1);
    assert_eq!(shell.refused(&format!("cp fsck {processing}")), (3, "CHECKPOINT_NOT_READY".to_owned()));
    set(1, CheckpointState::Failed);
    let output = shell.run("cp fsck --all");
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stdout).contains(&format!("{processing}  CHECKPOINT_NOT_READY  ")));
}

#[test]
fn help_and_completions_know_the_commands() {
    let shell = Shell::new();
    let help = shell.ok("--help");
    assert!(help.contains("  checkpoint ") && help.contains("[alias: cp]"), "{help}");
    assert!(shell.ok("fork --help").starts_with("Make new sandboxes of a sandbox as it is now"));
    let help = shell.ok("checkpoint --help");
    for command in ["create", "list", "get", "delete", "restore", "spawn", "fsck"] {
        assert!(help.contains(&format!("\n  {command} ")), "{command}: {help}");
        shell.ok(&format!("checkpoint {command} --help"));
    }
    let script = shell.ok("completions bash");
    assert!(script.contains("--retention-max-count") && script.contains("oc__subcmd__checkpoint"));
}
