//! Clients that ask over connections they keep.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use oc_integration::processes;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};

use super::bed::Proxy;
use crate::table::quantile;

/// Room for an answer's head, and for a small answer whole: what the client does takes processor time from who is measured.
const HEAD_BUFFER: usize = 4 << 10;
const BODY_BUFFER: usize = 256 << 10;

/// What came of a round.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Answers.
    pub per_second: f64,
    /// How long the slowest hundredth took.
    pub p99_ms: f64,
    /// What the proxy took of the processors for each answer.
    pub processor_us: f64,
}

/// Asks again as soon as there is an answer, on so many connections.
pub async fn requests(proxy: &Proxy, connections: usize, time: Duration) -> anyhow::Result<Load> {
    let taken = || proxy.pids.iter().map(|pid| processes::cpu_time(*pid)).sum::<anyhow::Result<Duration>>();
    let before = taken()?;
    let begun = Instant::now();
    let mut clients = JoinSet::new();
    for _ in 0..connections {
        let proxy = proxy.clone();
        clients.spawn(async move {
            let mut client = Client::connect(&proxy).await?;
            let mut took = Vec::new();
            while begun.elapsed() < time {
                let asked = Instant::now();
                client.ask("/small", &mut |_| ()).await?;
                took.push(asked.elapsed().as_secs_f64() * 1000.0);
            }
            anyhow::Ok(took)
        });
    }
    let mut all = Vec::new();
    while let Some(took) = clients.join_next().await {
        all.extend(took??);
    }
    #[expect(clippy::cast_precision_loss, reason = "answers of a few seconds")]
    let count = all.len() as f64;
    Ok(Load {
        per_second: count / begun.elapsed().as_secs_f64(),
        p99_ms: quantile(&all, 0.99),
        processor_us: (taken()? - before).as_secs_f64() * 1e6 / count,
    })
}

/// MiB a second of one large answer.
pub async fn download(proxy: &Proxy, bytes: usize) -> anyhow::Result<f64> {
    Client::connect(proxy).await?.download(bytes).await
}

/// Connections that have been answered once and stay open.
pub async fn hold(proxy: &Proxy, count: usize) -> anyhow::Result<Vec<Client>> {
    let mut held = Vec::new();
    for _ in 0..count {
        let mut client = Client::connect(proxy).await?;
        client.ask("/small", &mut |_| ()).await?;
        held.push(client);
    }
    Ok(held)
}

/// A connection.
#[derive(Debug)]
pub struct Client {
    stream: TcpStream,
    host: String,
    buffer: Vec<u8>,
}

impl Client {
    async fn connect(proxy: &Proxy) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(proxy.address).await?;
        stream.set_nodelay(true)?;
        Ok(Self::over(stream, &proxy.host))
    }

    /// One that asks over a connection of one's own.
    pub fn over(stream: TcpStream, host: &str) -> Self {
        Self { stream, host: host.to_owned(), buffer: vec![0; HEAD_BUFFER] }
    }

    /// MiB a second of one large answer.
    pub async fn download(&mut self, bytes: usize) -> anyhow::Result<f64> {
        let (begun, mut read) = (Instant::now(), 0);
        self.ask("/big", &mut |piece| read += piece).await?;
        ensure!(read == bytes, "{read} bytes of {bytes}");
        #[expect(clippy::cast_precision_loss, reason = "MiB")]
        let rate = (bytes >> 20) as f64 / begun.elapsed().as_secs_f64();
        Ok(rate)
    }

    /// Asks, and reads the whole answer, which says how long it is.
    async fn ask(&mut self, path: &str, read: &mut (dyn FnMut(usize) + Send)) -> anyhow::Result<()> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: {}\r\n\r\n", self.host);
        self.stream.write_all(request.as_bytes()).await?;
        let mut filled = 0;
        let end = loop {
            let length = self.stream.read(&mut self.buffer[filled..]).await?;
            ensure!(length > 0, "it ended");
            filled += length;
            if let Some(at) = self.buffer[..filled].windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
        };
        let head = std::str::from_utf8(&self.buffer[..end])?.to_ascii_lowercase();
        ensure!(head.starts_with("http/1.1 200"), "{head}");
        let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
        let length: usize = length.with_context(|| format!("no length: {head}"))?.trim().parse()?;
        let mut left = length - (filled - end);
        read(filled - end);
        if left > 0 {
            let mut body = vec![0; BODY_BUFFER];
            while left > 0 {
                let length = self.stream.read(&mut body).await?;
                ensure!(length > 0, "it ended");
                left -= length;
                read(length);
            }
        }
        Ok(())
    }
}
