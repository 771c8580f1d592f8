//! What there is to reach: a server in a network namespace that a test makes, linked to this machine.
//!
//! It has four addresses: one that is of the internet, as far as a sandbox can tell, two that are private, of which a mesh is
//! told to except the first, and one of IPv6 that is excepted, too. All are answered alike, so that what a sandbox does not
//! reach is not just absent.

mod files;

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::{TcpListener, UdpSocket},
    os::fd::AsFd as _,
    process::Command,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::Context as _;
use nix::sched::{CloneFlags, setns};
use serde_json::Value;

use self::files::Files;
use crate::mesh::succeeded;

/// Where the server takes connections and datagrams.
pub const PORT: u16 = 7007;
/// Where it takes those of HTTP.
const HTTP_PORT: u16 = 80;
/// How the names of all worlds begin.
pub const PREFIX: &str = "ocw";
/// As long as a client may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Who sent one, and what is in it.
pub type Datagram = (String, Vec<u8>);

/// A server in a namespace of its own.
#[derive(Debug)]
pub struct World {
    /// Its namespace's, and that of this machine's link to it.
    pub name: String,
    /// Of the internet.
    pub public: String,
    /// This machine's, likewise.
    pub public_of_host: String,
    /// Private, and excepted.
    pub excepted: String,
    /// Private, and not excepted.
    pub private: String,
    /// Of IPv6, and excepted.
    pub excepted6: String,
    /// Of IPv6, private, and not excepted.
    pub private6: String,
    datagrams: Arc<Mutex<Vec<Datagram>>>,
    files: Files,
}

impl World {
    /// Makes it.
    ///
    /// # Errors
    ///
    /// If this machine does not permit.
    pub fn make() -> anyhow::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // Two tests that run at once have nothing in common, nor has one with what another, that was killed, has left.
        let mut addresses = Command::new("ip");
        addresses.args(["-o", "-4", "address"]);
        let there = succeeded(addresses)?;
        let mut free = (0..250).map(|more| (std::process::id() + more) % 250);
        let a = free.find(|a| !there.contains(&format!(" 25.213.{a}."))).context("no address is free")?;
        let b = NEXT.fetch_add(1, Ordering::Relaxed) * 8;
        let name = format!("{PREFIX}{}-{b}", std::process::id());
        let world = Self {
            public: format!("25.213.{a}.{}", b + 2),
            public_of_host: format!("25.213.{a}.{}", b + 1),
            excepted: format!("10.213.{a}.{}", b + 2),
            private: format!("10.213.{a}.{}", b + 3),
            excepted6: format!("fd42:213:{a}:{b}::2"),
            private6: format!("fd42:213:{a}:{b}::3"),
            datagrams: Arc::default(),
            files: Files::default(),
            name,
        };
        let of_host6 = format!("fd42:213:{a}:{b}::1");
        let of_host = format!("10.213.{a}.{}", b + 1);
        let name = &world.name;
        let ip = |line: String| -> anyhow::Result<()> {
            let mut command = Command::new("ip");
            command.args(line.split_whitespace());
            succeeded(command).map(drop)
        };
        ip(format!("netns add {name}"))?;
        ip(format!("link add {name} type veth peer name world netns {name}"))?;
        for address in
            [format!("{of_host}/29"), format!("{}/29", world.public_of_host), format!("{of_host6}/64 nodad")]
        {
            ip(format!("address add {address} dev {name}"))?;
        }
        ip(format!("link set {name} up"))?;
        for address in [
            format!("{}/29", world.public),
            format!("{}/29", world.excepted),
            format!("{}/29", world.private),
            format!("{}/64 nodad", world.excepted6),
            format!("{}/64 nodad", world.private6),
        ] {
            ip(format!("-n {name} address add {address} dev world"))?;
        }
        ip(format!("-n {name} link set world up"))?;
        ip(format!("-n {name} link set lo up"))?;
        world.serve()?;
        Ok(world)
    }

    /// Who sent which datagrams, so far.
    pub fn datagrams(&self) -> Vec<Datagram> {
        self.datagrams.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Has it answer `GET path` by HTTP, at the usual port; as a page where the path ends with a slash.
    pub fn publish(&self, path: &str, content: impl Into<Vec<u8>>) {
        self.files.put(path, content.into());
    }

    /// The numbers of the protocols that have arrived by IPv4, since they are noted.
    ///
    /// # Errors
    ///
    /// If its packet filter does not tell.
    pub fn protocols(&self) -> anyhow::Result<BTreeSet<u64>> {
        let listed = self.nft(&["--numeric-protocol", "--json", "list", "set", "ip", "world", "seen"])?;
        let listed: Value = serde_json::from_str(&listed)?;
        let all = listed["nftables"].as_array().context("no list")?;
        let seen = all.iter().filter_map(|one| one["set"]["elem"].as_array()).flatten();
        Ok(seen.filter_map(Value::as_u64).collect())
    }

    /// Has its packet filter note them from now on.
    ///
    /// # Errors
    ///
    /// If it does not take that.
    pub fn note_protocols(&self) -> anyhow::Result<()> {
        let rules = "table ip world { \
             set seen { type inet_proto; size 256; flags dynamic; }; \
             chain note { type filter hook prerouting priority filter; add @seen { ip protocol }; }; }";
        self.nft(&[rules]).map(drop)
    }

    /// Runs nft in its namespace.
    fn nft(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.within(|| {
            let mut nft = Command::new("nft");
            nft.args(arguments);
            succeeded(nft)
        })
    }

    /// Each connection is told who it comes from, as this sees it, and then gets as many bytes as it asks for by a number
    /// and a line feed; or, by `sink`, is read to its end and told how many those were.
    fn serve(&self) -> anyhow::Result<()> {
        let (streams, requests, socket) = self.within(|| {
            let [streams, requests] = [PORT, HTTP_PORT].map(|port| TcpListener::bind(("::", port)));
            anyhow::Ok((streams?, requests?, UdpSocket::bind(("::", PORT))?))
        })?;
        self.files.serve(requests);
        // Both end with the test's process.
        thread::spawn(move || {
            for stream in streams.incoming() {
                let Ok(mut stream) = stream else { continue };
                thread::spawn(move || {
                    stream.set_read_timeout(Some(PATIENCE))?;
                    let from = stream.peer_addr()?.ip().to_canonical();
                    stream.write_all(format!("{from}\n").as_bytes())?;
                    let mut wanted = Vec::new();
                    let mut byte = [0];
                    while stream.read(&mut byte)? == 1 && byte[0] != b'\n' && wanted.len() < 20 {
                        wanted.push(byte[0]);
                    }
                    if wanted == b"sink" {
                        let taken = std::io::copy(&mut stream, &mut std::io::sink())?;
                        return stream.write_all(format!("{taken}\n").as_bytes());
                    }
                    let wanted = String::from_utf8_lossy(&wanted).trim().parse().unwrap_or(0);
                    stream.write_all(&vec![b'x'; wanted])
                });
            }
        });
        let datagrams = self.datagrams.clone();
        thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let from = format!("{}:{}", from.ip().to_canonical(), from.port());
                let mut seen = datagrams.lock().unwrap_or_else(PoisonError::into_inner);
                seen.push((from, buffer[..length].to_vec()));
            }
        });
        Ok(())
    }

    /// Does something in its namespace, on a thread that ends with it.
    fn within<T: Send>(&self, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        let file = std::fs::File::open(format!("/run/netns/{}", self.name))?;
        thread::scope(|scope| {
            let thread = scope.spawn(move || {
                setns(file.as_fd(), CloneFlags::CLONE_NEWNET)?;
                work()
            });
            thread.join().ok().context("a thread in a namespace has panicked")?
        })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for arguments in [["link", "del"], ["netns", "del"]] {
            let _ = Command::new("ip").args(arguments).arg(&self.name).status();
        }
    }
}
