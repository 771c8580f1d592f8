//! Ports of a sandbox, as ports of this machine.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Stdio},
    sync::Arc,
};

use anyhow::{Context as _, bail, ensure};
use futures_util::StreamExt as _;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use oc_integration::{
    mesh::{Mesh, PATIENCE, eventually},
    rest::Sandbox,
};
use reqwest::Method;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::{checkpoints::fork, hibernation::hibernate};

/// Answers with what it gets, on the loopback alone; the end of that with its length.
const ECHO: &str = "
import socketserver

class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        length = 0
        while data := self.request.recv(65536):
            length += len(data)
            self.request.sendall(data)
        self.request.sendall(b'%d' % length)

socketserver.ThreadingTCPServer.request_queue_size = 64
socketserver.ThreadingTCPServer(('127.0.0.1', 3000), Echo).serve_forever()
";

/// Tells each who it comes from, on ports that differ in where they listen; on the last, an answer of HTTP that goes on until writing it
/// fails, which is noted.
const PEERS: &str = "
import socket, threading, time

def serve(family, address, port, answer):
    server = socket.create_server((address, port), family=family, dualstack_ipv6=address == '::')
    def run():
        while True:
            one, peer = server.accept()
            threading.Thread(target=answer, args=(one, peer[0])).start()
    threading.Thread(target=run).start()

def tell(one, peer):
    with one: one.sendall(peer.encode())

def tick(one, peer):
    try:
        one.sendall(b'HTTP/1.1 200 OK\\r\\n\\r\\n')
        while True:
            one.sendall(b'.')
            time.sleep(0.1)
    except OSError as error:
        open('ended', 'w').write(type(error).__name__)

serve(socket.AF_INET, '0.0.0.0', 3000, tell)
serve(socket.AF_INET, '127.0.0.1', 3001, tell)
serve(socket.AF_INET6, '::1', 3002, tell)
serve(socket.AF_INET6, '::', 3003, tell)
serve(socket.AF_INET, '0.0.0.0', 3004, tick)
open('ready', 'w')
";

/// `oc port-forward`, which is ended with it.
struct Forwarding(Child);

impl Forwarding {
    /// Forwards free ports to these of a sandbox; their addresses.
    fn to(mesh: &Mesh, sandbox: &Sandbox, ports: &[u16]) -> anyhow::Result<(Self, Vec<String>)> {
        let mut command = mesh.oc();
        command.args(["port-forward", &sandbox.id]).args(ports.iter().map(|port| format!("0:{port}")));
        let mut forwarding = Self(command.stdout(Stdio::piped()).spawn()?);
        let lines = BufReader::new(forwarding.0.stdout.take().context("no output")?).lines();
        let addresses = lines.take(ports.len()).map(|line| -> anyhow::Result<String> {
            Ok(line?.split_once(" -> ").context("no address")?.0.to_owned())
        });
        let addresses = addresses.collect::<anyhow::Result<Vec<_>>>()?;
        ensure!(addresses.len() == ports.len(), "it has ended");
        Ok((forwarding, addresses))
    }
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        let pid = Pid::from_raw(i32::try_from(self.0.id()).expect("a PID is small"));
        let _ = kill(pid, Signal::SIGINT);
        let _ = self.0.wait();
    }
}

/// Sends, ends, and returns what came back until the other side has ended, too.
async fn exchanged(address: &str, sent: &[u8]) -> anyhow::Result<Vec<u8>> {
    let connection = TcpStream::connect(address).await?;
    let (mut from, mut to) = connection.into_split();
    let sending = async {
        to.write_all(sent).await?;
        to.shutdown().await
    };
    let mut back = Vec::new();
    let done = async { tokio::try_join!(sending, from.read_to_end(&mut back)) };
    timeout(PATIENCE, done).await.context("it stands still")??;
    Ok(back)
}

pub async fn a_port_of_a_sandbox_is_one_of_this_machine(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    let sandbox = mesh.rest().create(json!({})).await?;
    sandbox.put("echo.py", ECHO).await?.expect(204)?;
    let listens = "nohup python3 echo.py > log 2>&1 &
        for _ in $(seq 400); do (: < /dev/tcp/127.0.0.1/3000) 2> /dev/null && exit 0; sleep 0.1; done; cat log; exit 1";
    sandbox.run(&format!("bash -c '{listens}'")).await?;
    let (forwarding, addresses) = Forwarding::to(&mesh, &sandbox, &[3000, 3001])?;
    let [echo, nobody] = &addresses[..] else { bail!("{addresses:?}") };

    // Every byte both ways, and each side's end, of many connections at once.
    let sent: Vec<u8> = (0..3_000_017_u32).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let small: Vec<u8> = sent[..1000].to_vec();
    let (large, many) = tokio::join!(
        exchanged(echo, &sent),
        futures_util::future::try_join_all((0..20).map(|_| exchanged(echo, &small))),
    );
    ensure!(large? == [&sent[..], b"3000017"].concat(), "a large exchange is not what was sent");
    for back in many? {
        ensure!(back == [&small[..], b"1000"].concat(), "a small exchange is not what was sent");
    }
    // Where nobody listens the connection breaks, and no other.
    let back = exchanged(nobody, b"x").await.unwrap_or_default();
    ensure!(back.is_empty(), "something answers where nobody listens: {back:?}");
    // One that sleeps is woken by a connection.
    mesh.rest().post(&sandbox.path("/hibernate"), json!({})).await?.expect(200)?;
    ensure!(exchanged(echo, b"awake").await? == b"awake5", "it is not what it was");
    drop(forwarding);
    sandbox.delete().await
}

pub async fn a_port_is_reached_wherever_its_server_listens(mesh: Arc<Mesh>) -> anyhow::Result<()> {
    // What it may reach says nothing about who reaches it.
    let rest = mesh.rest();
    let sandbox = rest.create(json!({ "timeout": 0, "egress": "none" })).await?;
    sandbox.put("peers.py", PEERS).await?.expect(204)?;
    sandbox.run("nohup python3 peers.py > log 2>&1 & until test -e ready; do sleep 0.1; done").await?;
    let (forwarding, addresses) = Forwarding::to(&mesh, &sandbox, &[3000, 3001, 3002, 3003, 3004])?;
    // By its network where it listens there, and by its loopback where it listens there alone.
    for (address, peer) in addresses.iter().zip(["198.18.0.1", "127.0.0.1", "::1", "::ffff:198.18.0.1"]) {
        let told = exchanged(address, b"").await?;
        ensure!(told == peer.as_bytes(), "{peer}: {}", String::from_utf8_lossy(&told));
    }

    // A connection goes on while its sandbox is forked; what the fork remembers of it is over.
    let mut ticks = TcpStream::connect(&addresses[4]).await?;
    let mut some = [0; 5];
    timeout(PATIENCE, ticks.read_exact(&mut some)).await??;
    let children = fork(&rest, &sandbox.path("/fork"), json!({ "mode": "live" })).await?;
    let ended = |sandbox: &Sandbox| {
        let sandbox = sandbox.clone();
        async move {
            eventually("the server has lost its client", async || {
                let how = sandbox.run("cat ended").await?;
                ensure!(["ConnectionResetError", "BrokenPipeError"].contains(&how.as_str()), "{how}");
                Ok(())
            })
            .await
        }
    };
    ended(&children[0]).await?;
    ensure!(sandbox.run("test -e ended || echo -n goes on").await? == "goes on", "the parent's has ended");
    timeout(PATIENCE, ticks.read_exact(&mut some)).await??;

    // It ends as its sandbox falls asleep, for both sides; and an answer whose end nothing else tells does not look whole.
    let name = format!("{}-p3004.preview.localhost", sandbox.id);
    let shown = rest.anonymous(Method::GET, "/").header("host", name).send().await?;
    let mut shown = shown.error_for_status()?.bytes_stream();
    timeout(PATIENCE, shown.next()).await?.context("no answer")??;
    hibernate(&rest, &sandbox).await?;
    let all = async {
        while shown.next().await.context("it looks whole")?.is_ok() {}
        anyhow::Ok(())
    };
    timeout(PATIENCE, all).await.context("a preview stands still")??;
    let mut rest_of_it = Vec::new();
    let _ = timeout(PATIENCE, ticks.read_to_end(&mut rest_of_it)).await.context("it stands still")?;
    ended(&sandbox).await?;
    ensure!(exchanged(&addresses[0], b"").await? == b"198.18.0.1", "it is not what it was");
    drop(forwarding);
    for child in children {
        child.delete().await?;
    }
    sandbox.delete().await
}
