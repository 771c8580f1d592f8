//! Names for guests: questions are passed on to the host's resolvers (docs/decisions/0017), as they are, but nothing else: a
//! resolver may let the machine that it is asked from read whole zones, and change them.
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
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy},
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
/// Questions that wait for their answers: of one VM, of all, and of one VM whatever others have.
const WAITING_PER_VM: usize = 32;
const WAITING: usize = 512;
const WAITING_ANYHOW: usize = 4;
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
                let place = is_question(&buffer[..length]).then(|| waiting.enter(from.ip()));
                let Some(place) = place.flatten() else { continue };
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

async fn talk(guest: TcpStream, resolvers: &[IpAddr]) -> io::Result<()> {
    for &resolver in resolvers {
        let connected = timeout(ANSWERS_WITHIN, TcpStream::connect(SocketAddr::new(resolver, PORT))).await;
        if let Ok(Ok(resolver)) = connected {
            return pass_on(guest, resolver).await;
        }
    }
    Ok(())
}

/// Passes on questions, each behind its length (RFC 1035, 4.2.2), and whatever is answered.
async fn pass_on(mut guest: TcpStream, mut resolver: TcpStream) -> io::Result<()> {
    let (mut from_guest, mut to_guest) = guest.split();
    let (mut from_resolver, mut to_resolver) = resolver.split();
    let asking = async {
        let mut message = Vec::new();
        // It may end before a question, and not in one.
        while let Ok(length) = from_guest.read_u16().await {
            message.resize(usize::from(length), 0);
            from_guest.read_exact(&mut message).await?;
            if !is_question(&message) {
                return Err(io::ErrorKind::InvalidData.into());
            }
            to_resolver.write_all(&[&length.to_be_bytes()[..], &message].concat()).await?;
        }
        to_resolver.shutdown().await
    };
    let answering = async {
        copy(&mut from_resolver, &mut to_guest).await?;
        to_guest.shutdown().await
    };
    tokio::try_join!(asking, answering).map(drop)
}

/// Whether a message asks for one name, and not for a whole zone.
fn is_question(message: &[u8]) -> bool {
    /// IXFR and AXFR (RFC 1995, RFC 5936).
    const ZONES: [u16; 2] = [251, 252];
    let number = |at: usize| Some(u16::from_be_bytes(message.get(at..at + 2)?.try_into().ok()?));
    let is_one = || {
        // No answer, and of the opcodes QUERY; one question (RFC 1035, 4.1.1).
        (message.get(2)? & 0xf8 == 0 && number(4)? == 1).then_some(())?;
        let mut at = LEAST;
        loop {
            match *message.get(at)? {
                0 => break,
                label @ 1..64 => at += usize::from(label) + 1,
                // Nothing is in front of it that it could point to.
                64.. => return None,
            }
        }
        Some(!ZONES.contains(&number(at + 1)?))
    };
    is_one().unwrap_or(false)
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
        let is_full = waiting.values().sum::<usize>() >= WAITING;
        let own = waiting.get(&from).copied().unwrap_or_default();
        if own >= if is_full { WAITING_ANYHOW } else { WAITING_PER_VM } {
            return None;
        }
        waiting.insert(from, own + 1);
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

    /// Asks for a name's records of this type, with these flags.
    fn question(name: &[&str], kind: u16, flags: u16) -> Vec<u8> {
        let mut message = vec![7, 7];
        for number in [flags, 1, 0, 0, 0] {
            message.extend(number.to_be_bytes());
        }
        for label in name {
            message.push(u8::try_from(label.len()).unwrap());
            message.extend(label.as_bytes());
        }
        message.push(0);
        message.extend(kind.to_be_bytes());
        message.extend([0, 1]);
        message
    }

    const WANTED: u16 = 0x0100;

    #[test]
    fn questions_for_names_are_passed_on_and_nothing_else() {
        let name = &["world", "test"][..];
        assert!(is_question(&question(name, 1, WANTED)));
        assert!(is_question(&question(&[], 2, 0)), "the root's name servers");
        // With what is behind the question, as EDNS is.
        assert!(is_question(&[question(name, 28, 0x0120), vec![0; 11]].concat()));
        for (kind, flags) in [(252, WANTED), (251, 0), (1, 0x8180), (6, 0x2000), (6, 0x2800)] {
            assert!(!is_question(&question(name, kind, flags)), "{kind} {flags:x}");
        }
        let whole = question(name, 1, WANTED);
        for short in 0..whole.len() - 2 {
            assert!(!is_question(&whole[..short]), "{short} bytes");
        }
        let mut two = whole.clone();
        two[5] = 2;
        assert!(!is_question(&two));
        let mut points = whole;
        points[LEAST] = 0xc0;
        assert!(!is_question(&points));
    }

    #[tokio::test]
    async fn a_conversation_is_passed_on_until_it_asks_for_more() {
        async fn pair() -> (TcpStream, TcpStream) {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
            (near.unwrap(), far.unwrap().0)
        }
        let framed =
            |message: &[u8]| [&u16::try_from(message.len()).unwrap().to_be_bytes()[..], message].concat();
        for (kind, is_passed) in [(28, true), (252, false)] {
            let ((mut guest, near), (far, mut resolver)) = (pair().await, pair().await);
            let passing = tokio::spawn(pass_on(near, far));
            let first = framed(&question(&["a"], 1, WANTED));
            guest.write_all(&first).await.unwrap();
            let mut asked = vec![0; first.len()];
            resolver.read_exact(&mut asked).await.unwrap();
            assert_eq!(asked, first);
            resolver.write_all(b"whatever").await.unwrap();
            let mut answer = [0; 8];
            guest.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, b"whatever");
            let second = framed(&question(&["b"], kind, WANTED));
            guest.write_all(&second).await.unwrap();
            guest.shutdown().await.unwrap();
            let mut asked = Vec::new();
            resolver.read_to_end(&mut asked).await.unwrap();
            assert_eq!(asked, if is_passed { second } else { Vec::new() });
            drop(resolver);
            assert_eq!(passing.await.unwrap().is_ok(), is_passed);
        }
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
        // Nor do many.
        let many: Vec<_> = (0..=255)
            .flat_map(|last| std::iter::from_fn(|| waiting.enter([3, 3, 3, last].into())).collect::<Vec<_>>())
            .collect();
        assert_eq!(many.len(), WAITING + 240 * WAITING_ANYHOW);
        let held: Vec<_> = std::iter::from_fn(|| waiting.enter(other)).collect();
        assert_eq!(held.len(), WAITING_ANYHOW);
    }
}
