//! Ports of a sandbox, as ports of this machine.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Stdio},
    sync::Arc,
};

use anyhow::{Context as _, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use oc_integration::mesh::{Mesh, PATIENCE};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

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

/// `oc port-forward`, which is ended with it.
struct Forwarding(Child);

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
        for _ in $(seq 100); do (: < /dev/tcp/127.0.0.1/3000) 2> /dev/null && exit 0; sleep 0.1; done; cat log; exit 1";
    sandbox.run(&format!("bash -c '{listens}'")).await?;
    let mut command = mesh.oc();
    command.args(["port-forward", &sandbox.id, "0:3000", "0:3001"]).stdout(Stdio::piped());
    let mut forwarding = Forwarding(command.spawn()?);
    let mut lines = BufReader::new(forwarding.0.stdout.take().context("no output")?).lines();
    let mut address = || -> anyhow::Result<String> {
        let line = lines.next().context("it has ended")??;
        Ok(line.split_once(" -> ").context("no address")?.0.to_owned())
    };
    let (echo, nobody) = (address()?, address()?);

    // Every byte both ways, and each side's end, of many connections at once.
    let sent: Vec<u8> = (0..3_000_017_u32).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let small: Vec<u8> = sent[..1000].to_vec();
    let (large, many) = tokio::join!(
        exchanged(&echo, &sent),
        futures_util::future::try_join_all((0..20).map(|_| exchanged(&echo, &small))),
    );
    ensure!(large? == [&sent[..], b"3000017"].concat(), "a large exchange is not what was sent");
    for back in many? {
        ensure!(back == [&small[..], b"1000"].concat(), "a small exchange is not what was sent");
    }
    // Where nobody listens the connection breaks, and no other.
    let back = exchanged(&nobody, b"x").await.unwrap_or_default();
    ensure!(back.is_empty(), "something answers where nobody listens: {back:?}");
    // One that sleeps is woken by a connection.
    mesh.rest().post(&sandbox.path("/hibernate"), json!({})).await?.expect(200)?;
    ensure!(exchanged(&echo, b"awake").await? == b"awake5", "it is not what it was");
    drop(forwarding);
    sandbox.delete().await
}
