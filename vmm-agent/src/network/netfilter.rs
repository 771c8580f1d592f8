//! Messages to the kernel's packet filter and its connection tracking, and what it answers (linux/netlink.h,
//! linux/netfilter/nfnetlink.h). What is asked is done when the call that asks it returns, and its answers are there.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
    },
};

/// nlmsghdr.
const HEADER: usize = 16;
/// nfgenmsg, which follows it.
const OF_NETFILTER: usize = 4;
/// An attribute's length and kind (struct nlattr).
const ATTRIBUTE: usize = 4;
/// What tells its kind from its flags (NLA_TYPE_MASK).
const KIND: u16 = 0x3fff;
/// A datagram of answers: a refusal repeats the message that it is about, a listing comes in pages (NLMSG_GOODSIZE) of this size
/// at most.
const MAX_ANSWERS: usize = 32 << 10;

/// One message.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// Subsystem and what it is to do.
    pub kind: u16,
    /// NLM_F_*, beside NLM_F_REQUEST.
    pub flags: u16,
    /// NFPROTO_*.
    pub family: u8,
    /// Whatever the kind has here.
    pub resource: u16,
    /// Its attributes.
    pub attributes: &'a [u8],
}

impl Message<'_> {
    /// Appends it as the kernel reads it.
    pub fn write(&self, to: &mut Vec<u8>) {
        let length = (HEADER + OF_NETFILTER + self.attributes.len()) as u32;
        to.extend_from_slice(&length.to_ne_bytes());
        to.extend_from_slice(&self.kind.to_ne_bytes());
        to.extend_from_slice(&(libc::NLM_F_REQUEST as u16 | self.flags).to_ne_bytes());
        // Its number, and the sender's, which the kernel knows.
        to.extend_from_slice(&[0; 8]);
        to.extend_from_slice(&[self.family, 0]);
        to.extend_from_slice(&self.resource.to_be_bytes());
        to.extend_from_slice(self.attributes);
    }
}

/// What the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer<'a> {
    /// One of what was asked for, behind its nfgenmsg: attributes.
    Item(&'a [u8]),
    /// Something is done.
    Done,
    /// Something is not.
    Refused(Errno),
}

/// A way to the netfilter of the namespace that it was opened in.
#[derive(Debug)]
pub struct Netfilter(OwnedFd);

impl Netfilter {
    /// That of this thread's namespace.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn open() -> io::Result<Self> {
        let netfilter = SockProtocol::NetlinkNetFilter;
        Ok(Self(socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, netfilter)?))
    }

    /// Sends messages, which are done by when it returns.
    ///
    /// # Errors
    ///
    /// If they cannot be sent. What they come to is in the answers.
    pub fn send(&self, messages: &[u8]) -> io::Result<()> {
        sendto(self.0.as_raw_fd(), messages, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        Ok(())
    }

    /// Gives `take` what has been answered, until that says that it was the last of it. True if it was, false if there is no more.
    ///
    /// # Errors
    ///
    /// If the answers cannot be read, or what `take` says.
    pub fn answers(&self, mut take: impl FnMut(Answer<'_>) -> io::Result<bool>) -> io::Result<bool> {
        let mut buffer = vec![0; MAX_ANSWERS];
        loop {
            let length = match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Err(Errno::EAGAIN) => return Ok(false),
                length => length?,
            };
            let mut rest = &buffer[..length];
            while !rest.is_empty() {
                let (answer, next) = split(rest).ok_or_else(malformed)?;
                if take(answer)? {
                    return Ok(true);
                }
                rest = next;
            }
        }
    }
}

/// The first answer of a datagram, and those behind it.
fn split(answers: &[u8]) -> Option<(Answer<'_>, &[u8])> {
    let length = usize::try_from(u32::from_ne_bytes(*answers.first_chunk()?)).ok()?;
    let kind = u16::from_ne_bytes(answers.get(4..6)?.try_into().ok()?);
    let payload = answers.get(HEADER..length)?;
    let answer = if matches!(i32::from(kind), libc::NLMSG_ERROR | libc::NLMSG_DONE) {
        // The end of a listing has an error number, too.
        match i32::from_ne_bytes(*payload.first_chunk()?) {
            0 => Answer::Done,
            error => Answer::Refused(Errno::from_raw(-error)),
        }
    } else {
        Answer::Item(payload.get(OF_NETFILTER..)?)
    };
    Some((answer, answers.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// What the kernel would not say.
pub fn malformed() -> io::Error {
    io::Error::other("the packet filter's answer is malformed")
}

/// An attribute with its value.
pub fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = ATTRIBUTE + value.len();
    let mut bytes = Vec::with_capacity(length.next_multiple_of(4));
    bytes.extend_from_slice(&(length as u16).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(length.next_multiple_of(4), 0);
    bytes
}

/// An attribute of attributes.
pub fn nested(kind: u16, attributes: &[u8]) -> Vec<u8> {
    attribute(libc::NLA_F_NESTED as u16 | kind, attributes)
}

/// The value of the first of these attributes that is of that kind.
pub fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(*attributes.first_chunk()?));
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        let value = attributes.get(ATTRIBUTE..length)?;
        if kind & KIND == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_say_how_long_they_are() {
        let named = attribute(2, b"oc\0");
        assert_eq!(named, [&7_u16.to_ne_bytes()[..], &2_u16.to_ne_bytes(), b"oc\0\0"].concat());
        let outer = nested(3, &named);
        assert_eq!(outer[..4], [12_u16.to_ne_bytes(), 0x8003_u16.to_ne_bytes()].concat());
        let two = [outer, attribute(7, &[9])].concat();
        assert_eq!(find(&two, 3).and_then(|inner| find(inner, 2)), Some(&b"oc\0"[..]));
        assert_eq!(find(&two, 7), Some(&[9][..]));
        assert_eq!(find(&two, 4), None);
        for cut in 0..two.len() {
            assert_eq!(find(&two[..cut], 4), None, "{cut}");
        }
        // One that says that it has no length leads nowhere.
        assert_eq!(find(&[0; 16], 4), None);
    }

    fn answer(kind: i32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(HEADER + payload.len()).unwrap();
        let kind = u16::try_from(kind).unwrap();
        [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 10], payload].concat()
    }

    #[test]
    fn answers_are_told_apart() {
        let item = answer(0x100, &[2, 0, 0, 0, 7, 7, 7, 7]);
        let refused = answer(libc::NLMSG_ERROR, &[&(-libc::ENOENT).to_ne_bytes()[..], &[0; 20]].concat());
        let done = answer(libc::NLMSG_DONE, &0_i32.to_ne_bytes());
        let all = [item, refused, done].concat();
        let (first, rest) = split(&all).unwrap();
        assert_eq!(first, Answer::Item(&[7; 4]));
        let (second, rest) = split(rest).unwrap();
        assert_eq!(second, Answer::Refused(Errno::ENOENT));
        let (third, rest) = split(rest).unwrap();
        assert_eq!((third, rest), (Answer::Done, &[][..]));
        for cut in 0..24 {
            assert_eq!(split(&all[..cut]), None, "{cut}");
        }
    }
}
