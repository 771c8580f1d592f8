//! `oc files`, as a shell runs it, against a mesh without microVMs.

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::{
        ffi::OsStrExt as _,
        fs::{PermissionsExt as _, symlink},
    },
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::{Value, json};

use crate::fake::{Fake, KEY, files::Entry};

/// A mesh, and a directory to copy to and from.
struct Shell {
    mesh: Fake,
    here: tempfile::TempDir,
}

impl Shell {
    fn new() -> Self {
        Self { mesh: Fake::start(), here: tempfile::tempdir().unwrap() }
    }

    fn command<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_oc"));
        command
            .arg("files")
            .args(words)
            .env_clear()
            .env("HOME", "/nonexistent")
            .env("OC_STATE_DIR", "/nonexistent")
            .env("OC_API_URL", format!("http://{}", self.mesh.address))
            .env("OC_API_KEY", KEY)
            .current_dir(self.here.path())
            .stdin(Stdio::null());
        command
    }

    fn run<const N: usize>(&self, words: [&str; N]) -> Output {
        self.command(words).output().unwrap()
    }

    fn ok<const N: usize>(&self, words: [&str; N]) -> String {
        let output = self.run(words);
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Exit code and error.
    fn refused<const N: usize>(&self, words: [&str; N]) -> (i32, String) {
        let output = self.run(words);
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    }

    fn put(&self, path: &str, entry: Entry) {
        self.mesh.state.lock().unwrap().files.insert(path.to_owned(), entry);
    }

    fn put_file(&self, path: &str, content: &[u8]) {
        self.put(path, Entry::File { content: content.to_vec(), mode: 0o640 });
    }

    fn content(&self, path: &str) -> Option<(Vec<u8>, u32)> {
        match self.mesh.state.lock().unwrap().files.get(path) {
            Some(Entry::File { content, mode }) => Some((content.clone(), *mode)),
            _ => None,
        }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.here.path().join(name)
    }

    fn names(&self, directory: &str) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.path(directory))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }
}

/// Bytes that repeat only late, more than one message holds.
fn big() -> Vec<u8> {
    (0..3_000_001_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[0]).collect()
}

#[test]
fn a_file_goes_in_and_comes_back_the_same() {
    let shell = Shell::new();
    fs::write(shell.path("up"), big()).unwrap();
    fs::set_permissions(shell.path("up"), fs::Permissions::from_mode(0o751)).unwrap();
    shell.ok(["cp", "up", "sb-1:data/file"]);
    assert_eq!(shell.content("/home/sandbox/data/file"), Some((big(), 0o751)));
    shell.ok(["cp", "sb-1:data/file", "down"]);
    assert_eq!(fs::read(shell.path("down")).unwrap(), big());
    assert_eq!(fs::metadata(shell.path("down")).unwrap().permissions().mode() & 0o700, 0o700);
    assert_eq!(shell.names("."), ["down", "up"]);
}

#[test]
fn an_empty_file_is_a_file() {
    let shell = Shell::new();
    fs::write(shell.path("empty"), "").unwrap();
    let copied: Value = serde_json::from_str(&shell.ok(["cp", "--json", "empty", "sb-1:/e"])).unwrap();
    assert_eq!(copied, json!({ "files": 1, "bytes": 0, "skipped": 0 }));
    shell.ok(["cp", "sb-1:/e", "back"]);
    assert_eq!(fs::read(shell.path("back")).unwrap(), b"");
}

#[test]
fn directories_get_the_copy_under_its_own_name() {
    let shell = Shell::new();
    shell.put("/d", Entry::Directory);
    shell.put("/workspace", Entry::Link("/d".into()));
    fs::write(shell.path("f"), "x").unwrap();
    for (to, lands) in [
        ("sb-1:", "/home/sandbox/f"),
        ("sb-1:/d", "/d/f"),
        ("sb-1:/workspace", "/workspace/f"),
        ("sb-1:/new/", "/new/f"),
    ] {
        shell.ok(["cp", "f", to]);
        assert!(shell.content(lands).is_some(), "{to}");
    }
    fs::create_dir(shell.path("here")).unwrap();
    shell.ok(["cp", "sb-1:/d/f", "here"]);
    assert_eq!(fs::read(shell.path("here/f")).unwrap(), b"x");
    assert_eq!(shell.refused(["cp", "sb-1:/d/f", "nowhere/"]).0, 1);
}

#[test]
fn standard_input_and_output_are_files_too() {
    let shell = Shell::new();
    let mut child = shell.command(["cp", "-", "sb-1:/in"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&big()).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(shell.content("/in").unwrap().0, big());
    assert_eq!(shell.run(["cp", "sb-1:/in", "-"]).stdout, big());
    assert_eq!(shell.refused(["cp", "-r", "sb-1:/in", "-"]).0, 2);
}

#[test]
fn trees_go_in_and_come_back_without_links() {
    let shell = Shell::new();
    for directory in ["tree", "tree/sub", "tree/empty"] {
        fs::create_dir(shell.path(directory)).unwrap();
    }
    for n in 0..20 {
        fs::write(shell.path(&format!("tree/sub/{n}")), format!("{n}")).unwrap();
    }
    fs::write(shell.path("tree/a b\n'\"$(x)"), "odd").unwrap();
    symlink("/etc", shell.path("tree/link")).unwrap();
    fs::write(shell.path("tree/sub/big"), big()).unwrap();
    let copied: Value = serde_json::from_str(&shell.ok(["cp", "-r", "--json", "tree", "sb-1:/t"])).unwrap();
    assert_eq!(copied["files"], 22);
    assert_eq!(shell.content("/t/sub/big").unwrap(), (big(), 0o644));
    assert_eq!(copied["skipped"], 1);
    assert_eq!(shell.content("/t/sub/7").unwrap().0, b"7");
    assert_eq!(shell.content("/t/a b\n'\"$(x)").unwrap().0, b"odd");

    shell.put("/t/evil", Entry::Link("/etc/passwd".into()));
    shell.ok(["cp", "-r", "sb-1:/t", "back"]);
    assert_eq!(shell.names("back"), ["a b\n'\"$(x)", "empty", "sub"]);
    assert_eq!(shell.names("back/sub").len(), 21);
    assert_eq!(fs::read(shell.path("back/sub/big")).unwrap(), big());
    // The second time there is a directory to copy into.
    shell.ok(["cp", "-r", "sb-1:/t", "back"]);
    assert_eq!(shell.names("back/t/sub").len(), 21);
    let (code, error) = shell.refused(["cp", "tree", "sb-1:/t"]);
    assert_eq!(code, 2);
    assert!(error.contains("-r"), "{error}");
    shell.put("/dir", Entry::Directory);
    assert!(shell.refused(["cp", "sb-1:/dir", "x"]).1.contains("-r"));
}

#[test]
fn a_sandbox_cannot_write_outside_the_destination() {
    let shell = Shell::new();
    shell.put("/evil", Entry::Directory);
    shell.put_file("/evil/../../escaped", b"x");
    fs::create_dir(shell.path("inner")).unwrap();
    let (code, error) = shell.refused(["cp", "-r", "sb-1:/evil", "inner/to"]);
    assert_eq!(code, 1);
    assert!(error.contains("unsafe name"), "{error}");
    assert_eq!(shell.names("."), ["inner"]);
}

#[test]
fn a_download_that_breaks_leaves_what_was_there() {
    let shell = Shell::new();
    shell.put_file("/breaks", &big());
    fs::write(shell.path("old"), "old").unwrap();
    let (code, error) = shell.refused(["cp", "sb-1:/breaks", "old"]);
    assert_eq!((code, error.as_str()), (5, "error: the disk is on fire\ncode: INTERNAL\n"));
    assert_eq!(shell.names("."), ["old"]);
    assert_eq!(fs::read(shell.path("old")).unwrap(), b"old");
}

#[test]
fn a_file_that_cannot_be_read_is_not_committed() {
    let shell = Shell::new();
    // Opens, and fails at its first byte.
    let (code, error) = shell.refused(["cp", "/proc/self/mem", "sb-1:/m"]);
    assert_eq!(code, 1, "{error}");
    assert!(error.contains("cannot read /proc/self/mem"), "{error}");
    assert!(shell.content("/m").is_none());
}

#[test]
fn an_upload_that_is_interrupted_is_not_committed() {
    let shell = Shell::new();
    let mut child = shell.command(["cp", "-", "sb-1:/m"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&[7; 1 << 20]).unwrap();
    let until = |what: &str, condition: &dyn Fn(&crate::fake::State) -> bool| {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while !condition(&shell.mesh.state.lock().unwrap()) {
            assert!(std::time::Instant::now() < deadline, "never: {what}");
            std::thread::yield_now();
        }
    };
    until("the upload begins", &|state| state.uploads == 1);
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    // Its input is still open: what ends the upload is the signal.
    assert_eq!(child.wait().unwrap().code(), Some(130));
    until("the mesh hears that it broke", &|state| state.broken_uploads == 1);
    assert!(shell.content("/m").is_none());
}

#[test]
fn refusals_in_mid_stream_are_told() {
    let shell = Shell::new();
    fs::write(shell.path("up"), big()).unwrap();
    let (code, error) = shell.refused(["cp", "up", "sb-1:/full"]);
    assert_eq!((code, error.as_str()), (5, "error: the disk is full\ncode: GUEST_DISK_FULL\n"));
    fs::create_dir(shell.path("tree")).unwrap();
    fs::write(shell.path("tree/up"), big()).unwrap();
    let (code, error) = shell.refused(["cp", "-r", "tree", "sb-1:/full"]);
    assert_eq!((code, error.as_str()), (5, "error: the disk is full\ncode: GUEST_DISK_FULL\n"));
    shell.put("/breaks", Entry::Directory);
    shell.put_file("/breaks/whole", b"x");
    let (code, error) = shell.refused(["cp", "-r", "sb-1:/breaks", "back"]);
    assert_eq!((code, error.as_str()), (5, "error: the disk is on fire\ncode: INTERNAL\n"));
    assert!(shell.refused(["cp", "sb-1:/none", "x"]).1.contains("FILE_NOT_FOUND"));
    assert!(shell.refused(["cp", "-r", "sb-1:/none", "x"]).1.contains("FILE_NOT_FOUND"));
    assert_eq!(shell.refused(["cp", "gone", "sb-1:/x"]).0, 1);
}

#[test]
fn sides_must_make_sense() {
    let shell = Shell::new();
    for [from, to] in [["a", "b"], ["sb-1:a", "sb-2:b"], ["-", "-"]] {
        assert_eq!(shell.refused(["cp", from, to]).0, 2, "{from} {to}");
    }
}

#[test]
fn names_that_are_not_text_are_fine() {
    let shell = Shell::new();
    let odd = OsStr::from_bytes(b"\xff-name");
    fs::create_dir(shell.path("tree")).unwrap();
    fs::write(shell.path("tree").join(odd), "x").unwrap();
    shell.ok(["cp", "-r", "tree", "sb-1:/t"]);
    assert_eq!(shell.content("/t/\u{fffd}-name").unwrap().0, b"x");
    let path = Path::new("tree").join(odd);
    let status =
        shell.command([OsStr::new("cp"), path.as_os_str(), OsStr::new("sb-1:/plain")]).status().unwrap();
    assert!(status.success());
    assert_eq!(shell.content("/plain").unwrap().0, b"x");
}

#[test]
fn the_other_commands_do_what_they_say() {
    let shell = Shell::new();
    shell.ok(["mkdir", "sb-1:d"]);
    shell.put_file("/home/sandbox/d/f", b"abc");
    shell.put("/home/sandbox/d/l", Entry::Link("f".into()));
    assert!(shell.ok(["ls", "sb-1"]).contains("directory"));
    let table = shell.ok(["ls", "sb-1:d"]);
    assert!(table.contains("file     0640  3") && table.contains("l -> f"), "{table}");
    assert_eq!(shell.ok(["ls", "sb-1", "d"]), table);
    let listed: Value = serde_json::from_str(&shell.ok(["ls", "--json", "sb-1:d"])).unwrap();
    assert_eq!(listed[0]["name"], "f");
    assert_eq!(listed[0]["isDir"], false);
    let stat: Value = serde_json::from_str(&shell.ok(["stat", "--json", "sb-1:d/f"])).unwrap();
    assert_eq!((&stat["size"], &stat["type"]), (&json!(3), &json!("file")));
    assert!(shell.ok(["stat", "sb-1:d/f"]).contains("mode   0640\n"));
    shell.ok(["mv", "sb-1:d/f", "d/g"]);
    shell.ok(["mv", "sb-1", "d/g", "d/h"]);
    assert!(shell.content("/home/sandbox/d/h").is_some());
    shell.ok(["rm", "sb-1:d"]);
    assert_eq!(shell.refused(["stat", "sb-1:d/h"]).0, 3);
    assert_eq!(shell.refused(["rm", "sb-1"]).0, 2);
}

#[test]
fn what_happens_in_a_directory_is_printed_until_it_is_gone() {
    let shell = Shell::new();
    let output = shell.run(["watch", "-r", "sb-1:/ends"]);
    assert!(output.status.success());
    let expected = "created   /ends/new/\nmodified  /ends/new/f\nrenamed   /d/a -> /ends/b\nremoved   /ends/b\n\
                    overflow  more happened than can be told: look again\n";
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
    assert!(shell.mesh.state.lock().unwrap().directories_watched[0].recursive);
    let lines = shell.ok(["watch", "--json", "sb-1", "/ends"]);
    let events: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((&events[0]["type"], &events[0]["isDir"]), (&json!("created"), &json!(true)));
    assert_eq!(events[2]["renamedFrom"], "/d/a");
    // What happened meanwhile is not known.
    assert!(shell.refused(["watch", "sb-1:/breaks"]).1.contains("HOST_UNAVAILABLE"));
    assert!(shell.refused(["watch", "sb-1:/none"]).1.contains("FILE_NOT_FOUND"));
}

#[test]
fn ctrl_c_ends_a_watch() {
    let shell = Shell::new();
    let mut child = shell.command(["watch", "sb-1:/d"]).stdout(Stdio::piped()).spawn().unwrap();
    // Open until it ends: more is printed than is read here.
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "created   /d/new/\n");
    crate::fake::shell::signal(&child, nix::sys::signal::Signal::SIGINT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn urls_are_made_for_reading_and_writing() {
    let shell = Shell::new();
    assert_eq!(shell.ok(["url", "sb-1:/f"]), "http://mesh/download?path=/f&for=None\n");
    let made: Value =
        serde_json::from_str(&shell.ok(["url", "--json", "--upload", "--expires", "60", "sb-1:/f"])).unwrap();
    assert_eq!(made["url"], "http://mesh/upload?path=/f&for=Some(60)");
    assert_eq!(made["expiresAt"], "1970-01-01T00:00:00Z");
    assert_eq!(shell.refused(["url", "sb-1"]).0, 2);
    assert_eq!(shell.refused(["url", "--expires", "0", "sb-1:/f"]).0, 2);
}
