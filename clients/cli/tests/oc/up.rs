//! `oc up` and `oc down` over services that are shell scripts, and a gateway that is this test binary.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::fake::shell::{script, text};

const PATIENCE: Duration = Duration::from_secs(60);
const SERVICES: [&str; 3] = ["scheduler", "vmm-agent", "gateway"];

/// Not a test of its own: what the script `oc-gateway` runs.
#[test]
fn serve_as_the_gateway() {
    let Ok(address) = std::env::var("OC_FAKE_GATEWAY") else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        crate::fake::serve(listener, None, std::sync::Arc::default()).await;
    });
}

/// A state directory, and binaries that write down what happens to them.
struct Machine {
    directory: tempfile::TempDir,
}

impl Machine {
    fn new() -> Self {
        let machine = Self { directory: tempfile::Builder::new().prefix("oc-up-").tempdir().unwrap() };
        fs::create_dir_all(machine.path("bin")).unwrap();
        fs::create_dir_all(machine.path("images/base")).unwrap();
        fs::write(machine.path("images/base/manifest.json"), "{}").unwrap();
        let here = machine.directory.path().display();
        let started = format!("echo \"$$ $*\" >> {here}/started.$(basename $0)");
        machine.script("oc-scheduler", &format!("{started}\nexec sleep 1000"));
        machine.script(
            "oc-vmm-agent",
            &format!("case $1 in --cleanup) echo \"$*\" >> {here}/cleaned; exit 0;; esac\n{started}\nexec sleep 1000"),
        );
        machine.script(
            "oc-gateway",
            &format!(
                "{started}\nwhile [ $1 != --listen ]; do shift; done\n\
                 OC_FAKE_DELETED={here}/deleted OC_FAKE_GATEWAY=$2 exec {} --exact up::serve_as_the_gateway --nocapture",
                std::env::current_exe().unwrap().display()
            ),
        );
        machine.script("oc-guest", "exit 1");
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn script(&self, name: &str, body: &str) {
        script(&self.path("bin").join(name), body);
    }

    fn oc(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_oc"));
        command
            .args(words)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", self.directory.path())
            .env("OC_STATE_DIR", self.path("state"))
            .env("OC_IMAGE_DIR", self.path("images"))
            .stdin(Stdio::null());
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.oc(words).output().unwrap()
    }

    fn up(&self, more: &[&str]) -> Command {
        let bin = self.path("bin");
        let mut command = self.oc(&["up", "--listen", "127.0.0.1:0", "--bin-dir", bin.to_str().unwrap()]);
        command.args(more);
        command
    }

    /// Starts a mesh in the foreground, and waits until it says that it is ready and all of it runs.
    fn started(&self) -> (Child, Value) {
        let log = fs::OpenOptions::new().append(true).create(true).open(self.path("stderr")).unwrap();
        let mut child = self.up(&["--json"]).stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let mut text = String::new();
        let mut lines = BufReader::new(child.stdout.as_mut().unwrap());
        while !text.ends_with("\n}\n") {
            let read = lines.read_line(&mut text).unwrap();
            assert_ne!(read, 0, "{text}{}", fs::read_to_string(self.path("stderr")).unwrap());
        }
        // It is ready by its gateway alone: the scripts in the places of the others may still be on their way.
        for service in SERVICES {
            until(&format!("{service} runs"), || self.pids(service).into_iter().any(is_alive));
        }
        (child, serde_json::from_str(&text).unwrap())
    }

    /// Process IDs that a service has had.
    fn pids(&self, service: &str) -> Vec<i32> {
        let lines = fs::read_to_string(self.path(&format!("started.oc-{service}"))).unwrap_or_default();
        lines.lines().map(|line| line.split(' ').next().unwrap().parse().unwrap()).collect()
    }

    fn every_pid(&self) -> Vec<i32> {
        SERVICES.iter().flat_map(|service| self.pids(service)).collect()
    }

    fn assert_nothing_is_left(&self) {
        for pid in self.every_pid() {
            assert!(!is_alive(pid), "{pid} still runs");
        }
        assert!(!self.path("state/run").exists());
        let mut names: Vec<_> = fs::read_dir(self.path("state"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["api-key", "log", "store.db"]);
    }
}

impl Drop for Machine {
    /// Whatever a failed test has left.
    fn drop(&mut self) {
        for pid in self.every_pid().into_iter().filter(|pid| is_alive(*pid)) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

fn is_alive(pid: i32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    !matches!(stat.rsplit_once(") ").unwrap().1.as_bytes()[0], b'Z' | b'X')
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::park_timeout(Duration::from_millis(10));
    }
}

fn words(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

#[test]
fn a_mesh_comes_up_is_used_and_leaves_nothing() {
    let machine = Machine::new();
    let (mut child, ready) = machine.started();
    assert_eq!(ready["accelerator"], "tcg");
    assert_eq!(ready["poolReady"], 1);
    assert_eq!(ready["pid"], child.id());

    let key = words(&machine.path("state/api-key"));
    let key = key.trim();
    let mode = |name: &str| fs::metadata(machine.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("state/api-key"), mode("state/run"), mode("state/store.db")), (0o600, 0o700, 0o600));
    let scheduler = words(&machine.path("started.oc-scheduler"));
    let state = machine.path("state");
    assert!(scheduler.contains(&format!("--store file://{}/store.db", state.display())), "{scheduler}");
    assert!(
        scheduler.contains(&format!("--listen unix://{}/run/scheduler.sock", state.display())),
        "{scheduler}"
    );
    assert!(scheduler.contains("--bootstrap-key-hash ") && !scheduler.contains(key), "{scheduler}");
    let agent = words(&machine.path("started.oc-vmm-agent"));
    assert!(agent.contains("--host-id local") && agent.contains("/bin/oc-guest"), "{agent}");

    // Other commands find it without being told.
    let exports = text(&machine.run(&["env"]).stdout);
    assert!(exports.contains(ready["url"].as_str().unwrap()) && exports.contains(key), "{exports}");
    assert!(machine.run(&["create"]).status.success());
    assert!(machine.run(&["create"]).status.success());

    signal(&child, Signal::SIGINT);
    assert!(child.wait().unwrap().success());
    assert_eq!(words(&machine.path("deleted")).lines().count(), 2);
    assert_eq!(
        words(&machine.path("cleaned")),
        format!("--cleanup --data-dir {}/agent --host-id local\n", state.display())
    );
    machine.assert_nothing_is_left();
    assert_eq!(machine.run(&["ls"]).status.code(), Some(3));
}

#[test]
fn a_service_that_is_killed_is_started_again() {
    let machine = Machine::new();
    let (mut child, _) = machine.started();
    for service in SERVICES {
        let before = machine.pids(service);
        kill(Pid::from_raw(before[0]), Signal::SIGKILL).unwrap();
        until("a new process", || machine.pids(service).len() == 2);
        until("its journal", || {
            let [old, new] = machine.pids(service)[..] else { panic!("it was started once more") };
            let journal = |pid| machine.path(&format!("state/run/{service}.{pid}.pid"));
            journal(new).exists() && !journal(old).exists()
        });
    }
    until("the mesh answers again", || machine.run(&["nodes"]).status.success());
    signal(&child, Signal::SIGTERM);
    assert!(child.wait().unwrap().success());
    assert!(
        words(&machine.path("stderr")).contains("gateway ended (signal: 9 (SIGKILL)); starting it again")
    );
    machine.assert_nothing_is_left();
}

#[test]
fn a_second_mesh_in_the_same_place_is_refused() {
    let machine = Machine::new();
    let (mut child, _) = machine.started();
    let output = machine.up(&[]).output().unwrap();
    assert_eq!(output.status.code(), Some(4));
    let error = text(&output.stderr);
    assert!(error.contains("already") && error.contains(&child.id().to_string()), "{error}");
    let output = machine.up(&["--detach", "--json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(4));
    assert!(text(&output.stderr).contains("\"CONFLICT\""), "{}", text(&output.stderr));
    assert!(machine.run(&["nodes"]).status.success());
    signal(&child, Signal::SIGTERM);
    assert!(child.wait().unwrap().success());
    machine.assert_nothing_is_left();
}

#[test]
fn services_outlive_a_killed_supervisor_and_the_next_one_takes_over() {
    let machine = Machine::new();
    let (mut first, _) = machine.started();
    let old = machine.every_pid();
    signal(&first, Signal::SIGKILL);
    first.wait().unwrap();
    assert!(old.iter().all(|pid| is_alive(*pid)));
    assert!(machine.run(&["nodes"]).status.success());

    let (mut second, _) = machine.started();
    assert!(old.iter().all(|pid| !is_alive(*pid)));
    // The microVMs are the next agent's: nothing was cleaned up.
    assert!(!machine.path("cleaned").exists());
    assert_eq!(machine.every_pid().len(), 6);
    signal(&second, Signal::SIGTERM);
    assert!(second.wait().unwrap().success());
    machine.assert_nothing_is_left();
}

#[test]
fn a_takeover_that_does_not_come_up_keeps_the_sandboxes() {
    let machine = Machine::new();
    let (mut first, _) = machine.started();
    signal(&first, Signal::SIGKILL);
    first.wait().unwrap();

    let bin = machine.path("bin");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let on_a_taken_port = ["up", "--listen", &address, "--bin-dir", bin.to_str().unwrap()];
    let gateway = machine.path("bin/oc-gateway");
    fs::rename(&gateway, machine.path("kept")).unwrap();
    machine.script("oc-gateway", "exec sleep 1000");
    for mut command in [machine.oc(&on_a_taken_port), machine.up(&["--ready-timeout", "1"])] {
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let error = text(&output.stderr);
        assert!(error.contains("`oc down` ends them"), "{error}");
        assert!(machine.every_pid().iter().all(|pid| !is_alive(*pid)), "a service runs on");
        assert!(machine.path("state/run/mesh.json").exists());
        assert!(!machine.path("cleaned").exists() && !machine.path("deleted").exists());
    }

    fs::rename(machine.path("kept"), &gateway).unwrap();
    let (mut child, _) = machine.started();
    assert!(!machine.path("cleaned").exists());
    signal(&child, Signal::SIGKILL);
    child.wait().unwrap();
    assert!(machine.run(&["down"]).status.success());
    assert!(machine.path("cleaned").exists());
    machine.assert_nothing_is_left();
}

#[test]
fn down_ends_what_a_killed_supervisor_left() {
    let machine = Machine::new();
    let (mut child, _) = machine.started();
    assert!(machine.run(&["create"]).status.success());
    signal(&child, Signal::SIGKILL);
    child.wait().unwrap();
    let output = machine.run(&["down", "--json"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["stopped"], true);
    assert_eq!(words(&machine.path("deleted")).lines().count(), 1);
    assert!(machine.path("cleaned").exists());
    machine.assert_nothing_is_left();
}

#[test]
fn a_detached_mesh_goes_on_until_it_is_taken_down() {
    let machine = Machine::new();
    let output = machine.up(&["--detach"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let said = text(&output.stdout);
    assert!(said.contains("mesh ready") && said.contains("oc down"), "{said}");
    assert!(machine.run(&["nodes"]).status.success());
    let output = machine.run(&["down"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(machine.path("cleaned").exists());
    machine.assert_nothing_is_left();
    let output = machine.run(&["down"]);
    assert!(output.status.success());
    assert!(text(&output.stderr).contains("no mesh runs"));
}

#[test]
fn the_meshs_own_names_are_told_to_who_gives_names_away_and_to_who_leads_by_them() {
    let machine = Machine::new();
    let names = ["--own-names", "api.example,b.example", "--own-names", "c.example", "--detach"];
    let output = machine.up(&names).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    for service in SERVICES {
        until(&format!("{service} runs"), || machine.pids(service).into_iter().any(is_alive));
        let line = words(&machine.path(&format!("started.oc-{service}")));
        let is_told = line.contains("--own-names api.example,b.example,c.example");
        assert_eq!(is_told, service != "vmm-agent", "{line}");
    }
    assert!(machine.run(&["down"]).status.success());
    machine.assert_nothing_is_left();
}

#[test]
fn a_service_that_cannot_start_is_named_with_its_last_words() {
    let machine = Machine::new();
    machine.script("oc-scheduler", "echo no store here >&2; exit 7");
    machine.script("oc-gateway", "exec sleep 1000");
    for more in [&[][..], &["--detach"]] {
        let output = machine.up(more).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let error = text(&output.stderr);
        assert!(
            error.contains("scheduler ended (exit status: 7)") && error.contains("no store here"),
            "{error}"
        );
        machine.assert_nothing_is_left();
    }
}

#[test]
fn a_mesh_that_is_interrupted_while_it_starts_stops() {
    let machine = Machine::new();
    machine.script("oc-gateway", "exec sleep 1000");
    let mut child = machine.up(&[]).stderr(Stdio::null()).spawn().unwrap();
    until("its services run", || machine.pids("scheduler").len() + machine.pids("vmm-agent").len() == 2);
    signal(&child, Signal::SIGINT);
    assert!(child.wait().unwrap().success());
    machine.assert_nothing_is_left();
    let output = machine.up(&["--ready-timeout", "1"]).output().unwrap();
    assert!(
        text(&output.stderr).contains("not ready after 1 s: waiting for the gateway"),
        "{}",
        text(&output.stderr)
    );
    machine.assert_nothing_is_left();
}

#[test]
fn a_service_that_does_not_listen_is_killed_when_asked_twice() {
    let machine = Machine::new();
    machine.script(
        "oc-scheduler",
        &format!(
            "trap '' TERM\necho $$ >> {}\nexec sleep 1000",
            machine.path("started.oc-scheduler").display()
        ),
    );
    let (mut child, _) = machine.started();
    let gateway = machine.pids("gateway")[0];
    signal(&child, Signal::SIGTERM);
    until("the gateway has gone first", || !is_alive(gateway));
    let since = Instant::now();
    signal(&child, Signal::SIGTERM);
    assert!(child.wait().unwrap().success());
    // Unasked, it would be waited for for 30 s.
    assert!(since.elapsed() < Duration::from_secs(25), "it was waited for");
    machine.assert_nothing_is_left();
}

#[test]
fn what_is_missing_is_said_before_anything_starts() {
    let machine = Machine::new();
    let refused = |command: &mut Command| {
        let output = command.output().unwrap();
        assert!(!machine.path("state").exists());
        (output.status.code().unwrap(), text(&output.stderr))
    };
    assert!(refused(&mut machine.oc(&["up", "--bin-dir", "/"])).1.contains("--bin-dir"));
    assert!(refused(machine.up(&[]).env("OC_IMAGE_DIR", "/tmp")).1.contains("--image-dir"));
    assert!(refused(&mut machine.up(&["--guest-binary", "/none"])).1.contains("/none"));
    assert_eq!(refused(&mut machine.up(&["--store", "redis://x"])).0, 2);
    assert_eq!(refused(&mut machine.up(&["--host-id", "a/b"])).0, 2);
}

#[test]
fn a_port_that_is_taken_is_said_and_leaves_nothing() {
    let machine = Machine::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let bin = machine.path("bin");
    let output = machine.run(&["up", "--listen", &address, "--bin-dir", bin.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("--listen"), "{}", text(&output.stderr));
    machine.assert_nothing_is_left();
}

#[test]
fn a_supervisor_killed_at_any_moment_leaves_nothing_that_is_not_found() {
    let machine = Machine::new();
    for round in 0..15 {
        let log = fs::OpenOptions::new().append(true).create(true).open(machine.path("stderr")).unwrap();
        let mut child = machine.up(&[]).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        // From before its first file to after its last service, in steps.
        std::thread::park_timeout(Duration::from_millis(round * 3));
        signal(&child, Signal::SIGKILL);
        child.wait().unwrap();
    }
    let (mut child, _) = machine.started();
    let alive = |service: &str| machine.pids(service).into_iter().filter(|pid| is_alive(*pid)).count();
    for service in SERVICES {
        assert_eq!(alive(service), 1, "{service}");
    }
    signal(&child, Signal::SIGTERM);
    assert!(child.wait().unwrap().success());
    machine.assert_nothing_is_left();
}
