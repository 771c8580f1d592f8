//! Names for guests: questions are passed on to the host's resolvers, unread (docs/decisions/0017).
//!
//! The sockets that guests reach are in the agent's own namespace, those that reach the resolvers in the host's, so a
//! resolver on the host's loopback or in its private network serves guests which can reach neither. Who is asked is read
//! anew whenever the host's configuration has changed.

use std::{
    collections::HashMap,
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener as StdListener, UdpSocket as StdSocket},
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream, UdpSocket},
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use super::plan::DNS;

const PORT: u16 = 53;
/// A header (RFC 1035, 4.1.1); and what fits into a datagram.
const LEAST: usize = 12;
const MOST: usize = 65_535;
/// How long a resolver may take before the next one is asked, and a conversation in all.
const ANSWERS_WITHIN: Duration = Duration::from_secs(3);
const TALKS_FOR: Duration = Duration::from_secs(30);
/// Questions that wait for their answers: of one VM, and of all.
const WAITING_PER_VM: usize = 32;
const WAITING: usize = 512;
/// After an error that lasts.
const RESTS: Duration = Duration::from_millis(50);
/// As many as the C library uses (MAXNS, resolv.h).
const MAX_RESOLVERS: usize = 3;

/// The sockets that guests ask at, made in the namespace of this thread.
///
/// # Errors
///
/// If its address is not there.
pub fn bind() -> io::Result<(StdSocket, StdListener)> {
    let (datagrams, streams) = (StdSocket::bind((DNS, PORT))?, StdListener::bind((DNS, PORT))?);
    datagrams.set_nonblocking(true)?;
    streams.set_nonblocking(true)?;
    Ok((datagrams, streams))
}

/// Passes on what is asked at these sockets to whom `resolv_conf` names. Ends when it is dropped.
///
/// # Errors
///
/// If the runtime does not take them.
pub async fn serve((datagrams, streams): (StdSocket, StdListener), resolv_conf: PathBuf) -> io::Result<()> {
    let (datagrams, streams) = (Arc::new(UdpSocket::from_std(datagrams)?), TcpListener::from_std(streams)?);
    let waiting = Waiting::default();
    let resolvers = Resolvers { conf: resolv_conf, known: Mutex::default() };
    let mut tasks = tokio::task::JoinSet::new();
    let mut buffer = vec![0; MOST];
    loop {
        tokio::select! {
            received = datagrams.recv_from(&mut buffer) => {
                let Ok((length, from)) = received else { continue };
                let Some(place) = waiting.enter(from.ip()).filter(|_| length >= LEAST) else { continue };
                let (question, datagrams) = (buffer[..length].to_vec(), datagrams.clone());
                let resolvers = resolvers.now();
                tasks.spawn(async move {
                    let _place = place;
                    if let Some(answer) = ask(&question, &resolvers).await {
                        let _ = datagrams.send_to(&answer, from).await;
                    }
                });
            }
            accepted = streams.accept() => {
                let Ok((stream, from)) = accepted else {
                    // Out of descriptors, most likely: some come back.
                    sleep(RESTS).await;
                    continue;
                };
                let Some(place) = waiting.enter(from.ip()) else { continue };
                let resolvers = resolvers.now();
                tasks.spawn(async move {
                    let _place = place;
                    let _ = timeout(TALKS_FOR, talk(stream, &resolvers)).await;
                });
            }
            Some(_) = tasks.join_next() => {}
        }
    }
}

/// Asks one resolver after the other.
async fn ask(question: &[u8], resolvers: &[IpAddr]) -> Option<Vec<u8>> {
    for &resolver in resolvers {
        match timeout(ANSWERS_WITHIN, ask_one(question, resolver)).await {
            Ok(Ok(answer)) => return Some(answer),
            Ok(Err(error)) => debug!(%resolver, %error, "a resolver does not answer"),
            Err(_) => debug!(%resolver, "a resolver does not answer in time"),
        }
    }
    None
}

async fn ask_one(question: &[u8], resolver: IpAddr) -> io::Result<Vec<u8>> {
    // A port of its own, and nobody else's datagrams: what comes is of whom was asked.
    let any: IpAddr = if resolver.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        std::net::Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect((resolver, PORT)).await?;
    socket.send(question).await?;
    let mut answer = vec![0; MOST];
    loop {
        let length = socket.recv(&mut answer).await?;
        // An answer has its question's number.
        if length >= LEAST && answer[..2] == question[..2] {
            answer.truncate(length);
            return Ok(answer);
        }
    }
}

async fn talk(mut guest: TcpStream, resolvers: &[IpAddr]) -> io::Result<()> {
    for &resolver in resolvers {
        let connected = timeout(ANSWERS_WITHIN, TcpStream::connect(SocketAddr::new(resolver, PORT))).await;
        if let Ok(Ok(mut resolver)) = connected {
            return copy_bidirectional(&mut guest, &mut resolver).await.map(drop);
        }
    }
    Ok(())
}

/// How many questions wait, by who has asked.
#[derive(Clone, Debug, Default)]
struct Waiting(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// One of those that wait.
#[derive(Debug)]
struct Place(Waiting, IpAddr);

impl Waiting {
    /// Room for a question of `from`, if there is some.
    fn enter(&self, from: IpAddr) -> Option<Place> {
        let mut waiting = self.0.lock();
        if waiting.values().sum::<usize>() >= WAITING {
            return None;
        }
        let own = waiting.entry(from).or_default();
        if *own >= WAITING_PER_VM {
            return None;
        }
        *own += 1;
        Some(Place(self.clone(), from))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut waiting = self.0.0.lock();
        if let Some(own) = waiting.get_mut(&self.1) {
            *own -= 1;
            if *own == 0 {
                waiting.remove(&self.1);
            }
        }
    }
}

/// The host's resolvers, as its configuration has them.
#[derive(Debug)]
struct Resolvers {
    conf: PathBuf,
    /// As of when, and what it said.
    known: Mutex<(Option<SystemTime>, Arc<[IpAddr]>)>,
}

impl Resolvers {
    fn now(&self) -> Arc<[IpAddr]> {
        let changed = fs::metadata(&self.conf).and_then(|file| file.modified()).ok();
        let mut known = self.known.lock();
        if known.0.is_none() || known.0 != changed {
            match fs::read_to_string(&self.conf) {
                Ok(text) => *known = (changed, parse(&text).into()),
                Err(error) => {
                    warn!(%error, conf = %self.conf.display(), "cannot read who is asked for names")
                }
            }
        }
        known.1.clone()
    }
}

/// The name servers of a resolv.conf(5), which are those of this machine where none is named.
fn parse(text: &str) -> Vec<IpAddr> {
    let servers = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()? == "nameserver").then_some(())?;
        // A link-local one names its link, too, which this does not follow.
        words.next()?.parse().ok()
    });
    let servers: Vec<_> = servers.take(MAX_RESOLVERS).collect();
    if servers.is_empty() { vec![Ipv4Addr::LOCALHOST.into()] } else { servers }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_resolvers_of_the_host_are_asked() {
        let text = "# x\nsearch a b\nnameserver 127.0.0.53\nnameserver fd00::1\nnameserver fe80::1%eth0\n\
                    nameserver 1.1.1.1\nnameserver 9.9.9.9\n";
        let wanted: Vec<IpAddr> = ["127.0.0.53", "fd00::1", "1.1.1.1"].map(|ip| ip.parse().unwrap()).into();
        assert_eq!(parse(text), wanted);
        assert_eq!(parse(""), [IpAddr::from(Ipv4Addr::LOCALHOST)]);
    }

    #[test]
    fn one_vm_leaves_room_for_the_others() {
        let waiting = Waiting::default();
        let (one, other) = (IpAddr::from([1, 1, 1, 1]), IpAddr::from([2, 2, 2, 2]));
        let held: Vec<_> = std::iter::from_fn(|| waiting.enter(one)).collect();
        assert_eq!(held.len(), WAITING_PER_VM);
        assert!(waiting.enter(other).is_some());
        drop(held);
        assert!(waiting.enter(one).is_some());
        assert!(waiting.0.lock().is_empty());
    }
}
