//! Another process on the same file: this test's own binary, told by its environment what to do. It ends with its
//! standard input, so that none outlives the test.

use std::{
    io::{BufRead as _, BufReader, Lines, Read as _, Write as _},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    time::Duration,
};

use oc_mesh::{
    membership::DEFAULT_TTL,
    store::{SharedStore, Txn, open},
};

use super::fixture::{next, put, put_under};

const ROLE: &str = "OC_TEST_CHILD_ROLE";
const FILE: &str = "OC_TEST_CHILD_FILE";
/// Marks the lines that are for the parent, among those of the test harness.
const MARK: &str = "child: ";

/// A running child; killed when dropped.
pub struct Process {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Process {
    /// Starts a child in a role on a file.
    pub fn start(role: &str, file: &Path) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["child", "--exact", "--nocapture"])
            .env(ROLE, role)
            .env(FILE, file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        Self { process, lines }
    }

    /// What it says next; `None` when it has ended.
    pub fn line(&mut self) -> Option<String> {
        loop {
            let line = self.lines.next()?.ok()?;
            if let Some((_, said)) = line.split_once(MARK) {
                return Some(said.into());
            }
        }
    }

    /// Its process ID.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Kills it with SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{MARK}{text}").unwrap();
    out.flush().unwrap();
}

/// What the child does; nothing if this process is none.
pub fn run() {
    let (Ok(role), Ok(file)) = (std::env::var(ROLE), std::env::var(FILE)) else { return };
    std::thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(0);
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let store = open(&format!("file://{file}")).await.unwrap();
        say("ready");
        match role.as_str() {
            "write" => write(store).await,
            "answer" => answer(store).await,
            "member" => member(store).await,
            "open" => {
                put(&store, &format!("opened/{}", std::process::id()), "").await;
                say("done");
            }
            "idle" => {
                let mut watch = store.watch("idle/", oc_mesh::store::Revision(0)).await.unwrap();
                let _ = next(&mut watch).await;
            }
            other => panic!("no role {other}"),
        }
    });
}

/// Writes for ever, several at once, and says what is acknowledged.
async fn write(store: SharedStore) {
    let writers = (0..4).map(|writer| {
        let store = store.clone();
        async move {
            for number in 0.. {
                let key = format!("written/{writer}-{number}");
                put(&store, &key, &number.to_string()).await;
                say(&key);
            }
        }
    });
    futures_util::future::join_all(writers).await;
}

/// Answers every `ping/x` with `pong/x`.
async fn answer(store: SharedStore) {
    let start = store.range("ping/", None, 1).await.unwrap().revision;
    let mut watch = store.watch("ping/", start).await.unwrap();
    say("watching");
    loop {
        for (key, value, _) in next(&mut watch).await.unwrap() {
            put(&store, &key.replace("ping/", "pong/"), &value.unwrap()).await;
        }
    }
}

/// Holds a key under a lease as members have it: short enough to be waited for, and not lost where the machine stands
/// still for a while.
async fn member(store: SharedStore) {
    let lease = store.grant_lease(DEFAULT_TTL).await.unwrap();
    let then = vec![put_under(lease, "member/child")];
    store.txn(Txn { compare: vec![], then }).await.unwrap();
    say("member");
    loop {
        store.keep_alive(lease).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
