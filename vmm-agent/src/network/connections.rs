//! The connections that the kernel follows for a namespace: which are somebody's, and their end
//! (linux/netfilter/nfnetlink_conntrack.h).
//!
//! Where packets pass three namespaces, each follows all of their connections, and none hears that a guest has gone: what it
//! had open would stay in the tables of those behind it, for hours.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use nix::errno::Errno;

use super::netfilter::{Answer, Message, Netfilter, attribute, find, malformed, nested};

const OURS: u16 = (libc::NFNL_SUBSYS_CTNETLINK as u16) << 8;
/// enum cntl_msg_types.
const GET: u16 = OURS | 1;
const DELETE: u16 = OURS | 2;
/// enum ctattr_type.
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const FILTER: u16 = 25;
/// enum ctattr_filter: which parts of its tuples make a connection one that is asked for; of them, whom it comes from (Linux 5.8;
/// an older kernel tells of all).
const FILTER_ORIG: u16 = 1;
const FILTER_REPLY: u16 = 2;
const IS_FROM: u32 = 1;
/// enum ctattr_tuple.
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
/// enum ctattr_ip.
const V4_SRC: u16 = 1;
const V4_DST: u16 = 2;
const V6_SRC: u16 = 3;
const V6_DST: u16 = 4;
/// enum ctattr_l4proto.
const PROTO_NUM: u16 = 1;
const PROTO_SRC_PORT: u16 = 2;
const PROTO_DST_PORT: u16 = 3;
/// Connections that are ended by one call.
const AT_ONCE: usize = 64;

/// Whose packets one direction of a connection has: of TCP or UDP. All others end by themselves within a minute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tuple {
    /// IPPROTO_*.
    pub protocol: u8,
    /// Whom they come from.
    pub from: SocketAddr,
    /// Whom they are for.
    pub to: SocketAddr,
}

/// A connection that is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Connection {
    /// The direction of whoever began it, as it comes in.
    pub asks: Tuple,
    /// The other one, as it comes in: what is translated on the way out is seen here.
    pub answers: Tuple,
}

impl Connection {
    /// The direction of whoever began it, as the next namespace on its way gets it.
    pub fn beyond(&self) -> Tuple {
        Tuple { from: self.answers.to, to: self.answers.from, ..self.answers }
    }
}

/// The connections that this thread's namespace follows, and that `from` has begun.
///
/// # Errors
///
/// Of the kernel.
pub fn begun_by(from: IpAddr) -> io::Result<Vec<Connection>> {
    // Of IPv6 the kernel tells of those that are from somebody else instead (seen with 6.18), so there it is asked for all.
    let wanted = if from.is_ipv4() {
        let parts = [attribute(FILTER_ORIG, &IS_FROM.to_ne_bytes()), attribute(FILTER_REPLY, &[0; 4])];
        let address = nested(TUPLE_ORIG, &nested(TUPLE_IP, &address(from, V4_SRC, V6_SRC)));
        [address, nested(FILTER, &parts.concat())].concat()
    } else {
        Vec::new()
    };
    let (flags, family) = (libc::NLM_F_DUMP as u16, family(from));
    let mut message = Vec::new();
    Message { kind: GET, flags, family, resource: 0, attributes: &wanted }.write(&mut message);
    let netfilter = Netfilter::open()?;
    netfilter.send(&message)?;
    let mut found = Vec::new();
    let is_whole = netfilter.answers(|answer| {
        match answer {
            Answer::Item(attributes) => {
                found.extend(connection(attributes).filter(|one| one.asks.from.ip() == from));
            }
            Answer::Done => return Ok(true),
            Answer::Refused(error) => return Err(error.into()),
        }
        Ok(false)
    })?;
    if is_whole { Ok(found) } else { Err(malformed()) }
}

/// Forgets those connections of this thread's namespace of which each of `tuples` is a direction. Fine if there are none.
///
/// # Errors
///
/// Of the kernel.
pub fn forget(tuples: &[Tuple]) -> io::Result<()> {
    let netfilter = Netfilter::open()?;
    for some in tuples.chunks(AT_ONCE) {
        let mut messages = Vec::new();
        for tuple in some {
            let attributes = nested(TUPLE_ORIG, &written(tuple));
            let family = family(tuple.from.ip());
            Message { kind: DELETE, flags: 0, family, resource: 0, attributes: &attributes }
                .write(&mut messages);
        }
        netfilter.send(&messages)?;
        // Of those that are forgotten nothing is said.
        netfilter.answers(|answer| match answer {
            Answer::Refused(error) if error != Errno::ENOENT => Err(error.into()),
            _ => Ok(false),
        })?;
    }
    Ok(())
}

fn family(address: IpAddr) -> u8 {
    (if address.is_ipv4() { libc::NFPROTO_IPV4 } else { libc::NFPROTO_IPV6 }) as u8
}

fn address(address: IpAddr, v4: u16, v6: u16) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => attribute(v4, &address.octets()),
        IpAddr::V6(address) => attribute(v6, &address.octets()),
    }
}

/// A tuple as the kernel reads it.
fn written(tuple: &Tuple) -> Vec<u8> {
    let ip = [address(tuple.from.ip(), V4_SRC, V6_SRC), address(tuple.to.ip(), V4_DST, V6_DST)];
    let proto = [
        attribute(PROTO_NUM, &[tuple.protocol]),
        attribute(PROTO_SRC_PORT, &tuple.from.port().to_be_bytes()),
        attribute(PROTO_DST_PORT, &tuple.to.port().to_be_bytes()),
    ];
    [nested(TUPLE_IP, &ip.concat()), nested(TUPLE_PROTO, &proto.concat())].concat()
}

/// What the kernel tells of a connection; none that has no ports.
fn connection(attributes: &[u8]) -> Option<Connection> {
    let tuple = |kind| read(find(attributes, kind)?);
    Some(Connection { asks: tuple(TUPLE_ORIG)?, answers: tuple(TUPLE_REPLY)? })
}

/// A tuple as the kernel writes it.
fn read(attributes: &[u8]) -> Option<Tuple> {
    let (ip, proto) = (find(attributes, TUPLE_IP)?, find(attributes, TUPLE_PROTO)?);
    let end = |v4, v6, port| {
        let address: IpAddr = match find(ip, v4) {
            Some(address) => <[u8; 4]>::try_from(address).ok()?.into(),
            None => <[u8; 16]>::try_from(find(ip, v6)?).ok()?.into(),
        };
        let port = u16::from_be_bytes(find(proto, port)?.try_into().ok()?);
        Some(SocketAddr::new(address, port))
    };
    let &[protocol] = find(proto, PROTO_NUM)? else { return None };
    Some(Tuple {
        protocol,
        from: end(V4_SRC, V6_SRC, PROTO_SRC_PORT)?,
        to: end(V4_DST, V6_DST, PROTO_DST_PORT)?,
    })
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream, UdpSocket},
        thread,
    };

    use nix::sched::{CloneFlags, unshare};
    use tokio::runtime;

    use super::{
        super::{links::Links, rules},
        *,
    };

    #[test]
    fn tuples_are_read_as_they_are_written() {
        for (from, to) in [("1.2.3.4:5", "6.7.8.9:10"), ("[fd00::1]:65535", "[2001::7]:443")] {
            let tuple = Tuple { protocol: 6, from: from.parse().unwrap(), to: to.parse().unwrap() };
            let bytes = written(&tuple);
            assert_eq!(read(&bytes), Some(tuple));
            for cut in 0..bytes.len() {
                assert_ne!(read(&bytes[..cut]), Some(tuple), "{cut}");
            }
        }
    }

    #[test]
    fn what_is_behind_a_translation_has_its_address() {
        let tuple = |from: &str, to: &str| Tuple {
            protocol: 17,
            from: from.parse().unwrap(),
            to: to.parse().unwrap(),
        };
        let translated = Connection {
            asks: tuple("10.0.0.2:7", "8.8.8.8:53"),
            answers: tuple("8.8.8.8:53", "25.0.0.1:9"),
        };
        assert_eq!(translated.beyond(), tuple("25.0.0.1:9", "8.8.8.8:53"));
    }

    #[test]
    fn a_connection_is_found_by_who_began_it_and_forgotten() {
        let in_its_namespace = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let links = Links::open(&runtime::Handle::current()).unwrap();
                links.set_up("lo", None, &[]).await.unwrap();
            });
            // Only where somebody asks for it are connections followed.
            rules::load(
                "table inet t { chain c { type filter hook input priority 0; ct state new accept; }; }",
            )
            .unwrap();
            for host in ["127.0.0.1", "::1"] {
                let host: IpAddr = host.parse().unwrap();
                assert_eq!(begun_by(host).unwrap(), []);
                let listener = TcpListener::bind((host, 0)).unwrap();
                let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                let (one, other) = (UdpSocket::bind((host, 0)).unwrap(), UdpSocket::bind((host, 0)).unwrap());
                one.send_to(b"x", other.local_addr().unwrap()).unwrap();
                let mut found = begun_by(host).unwrap();
                found.sort();
                let ends = |protocol, from: SocketAddr, to: SocketAddr| {
                    let (asks, answers) =
                        (Tuple { protocol, from, to }, Tuple { protocol, from: to, to: from });
                    Connection { asks, answers }
                };
                let tcp = ends(6, stream.local_addr().unwrap(), stream.peer_addr().unwrap());
                let udp = ends(17, one.local_addr().unwrap(), other.local_addr().unwrap());
                assert_eq!(found, [tcp, udp]);
                // More than go into one call, of which one is there.
                let nobody = Tuple { from: SocketAddr::new(host, 1), ..tcp.asks };
                let mut forgotten = vec![nobody; AT_ONCE + 1];
                forgotten.push(tcp.asks);
                forget(&forgotten).unwrap();
                assert_eq!(begun_by(host).unwrap(), [udp]);
                forget(&[udp.asks]).unwrap();
                assert_eq!(begun_by(host).unwrap(), []);
            }
        };
        thread::spawn(in_its_namespace).join().unwrap();
    }
}
