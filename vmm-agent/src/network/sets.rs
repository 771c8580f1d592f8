//! The elements of the packet filter's sets, changed by netlink: in one transaction, and without a process
//! (linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h).

use std::{io, os::fd::AsRawFd as _};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
    },
};

/// nlmsghdr, and nfgenmsg after it.
const HEADER: usize = 20;
/// nlmsghdr alone, and the error number after it (struct nlmsgerr).
const ANSWER: usize = 20;
/// A datagram of answers: each repeats the message that it is about.
const MAX_ANSWERS: usize = 16 << 10;
/// Messages of our own subsystem.
const OURS: u16 = (libc::NFNL_SUBSYS_NFTABLES as u16) << 8;
/// All who begin or end a transaction.
const FAMILY_ANY: u8 = 0;
/// `inet` tables.
const FAMILY_INET: u8 = libc::NFPROTO_INET as u8;
/// enum nft_set_elem_list_attributes.
const LIST_TABLE: u16 = 1;
const LIST_SET: u16 = 2;
const LIST_ELEMENTS: u16 = 3;
/// enum nft_list_attributes, nft_set_elem_attributes and nft_data_attributes.
const ELEMENT: u16 = 1;
const ELEMENT_KEY: u16 = 1;
const DATA_VALUE: u16 = 1;

/// Has each of the `sets` of an `inet` table in this thread's namespace hold the key that comes with it and nothing else, or
/// nothing at all. In a set of intervals, a key alone is where one begins that has no end.
///
/// # Errors
///
/// If there are no such sets, or the kernel does not take it: then they are as they were.
pub fn fill(table: &str, sets: &[(&str, Option<&[u8]>)]) -> io::Result<()> {
    let mut batch = Batch::default();
    batch.add(libc::NFNL_MSG_BATCH_BEGIN as u16, FAMILY_ANY, &[]);
    for &(set, key) in sets {
        let named = [attribute(LIST_TABLE, &text(table)), attribute(LIST_SET, &text(set))].concat();
        // Without elements: all there are.
        batch.add(OURS | libc::NFT_MSG_DELSETELEM as u16, FAMILY_INET, &named);
        if let Some(key) = key {
            let element = nested(ELEMENT, &nested(ELEMENT_KEY, &attribute(DATA_VALUE, key)));
            let filled = [named, nested(LIST_ELEMENTS, &element)].concat();
            batch.add(OURS | libc::NFT_MSG_NEWSETELEM as u16, FAMILY_INET, &filled);
        }
    }
    batch.add(libc::NFNL_MSG_BATCH_END as u16, FAMILY_ANY, &[]);
    batch.commit()
}

/// Messages that are taken all together, or not at all.
#[derive(Debug, Default)]
struct Batch {
    bytes: Vec<u8>,
    /// Messages whose success is told.
    told: usize,
}

impl Batch {
    fn add(&mut self, kind: u16, family: u8, attributes: &[u8]) {
        let is_told = family != FAMILY_ANY;
        self.told += usize::from(is_told);
        let flags = libc::NLM_F_REQUEST | if is_told { libc::NLM_F_ACK } else { 0 };
        // Which subsystem a transaction is of.
        let resource = if is_told { 0 } else { libc::NFNL_SUBSYS_NFTABLES as u16 };
        let length = (HEADER + attributes.len()) as u32;
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(flags as u16).to_ne_bytes());
        // Its number, and the sender's, which the kernel knows.
        self.bytes.extend_from_slice(&[0; 8]);
        self.bytes.extend_from_slice(&[family, 0]);
        self.bytes.extend_from_slice(&resource.to_be_bytes());
        self.bytes.extend_from_slice(attributes);
    }

    fn commit(self) -> io::Result<()> {
        let netfilter = SockProtocol::NetlinkNetFilter;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, netfilter)?;
        let socket = socket.as_raw_fd();
        sendto(socket, &self.bytes, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        // It is done by now, and what the kernel says of it is there.
        let mut buffer = vec![0; MAX_ANSWERS];
        let mut told = 0;
        while told < self.told {
            match recv(socket, &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => told += succeeded(&buffer[..length])?,
                Err(Errno::EAGAIN) => return Err(io::Error::other("the packet filter does not answer")),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// How many messages have succeeded, by these answers.
fn succeeded(mut answers: &[u8]) -> io::Result<usize> {
    let malformed = || io::Error::other("the packet filter's answer is malformed");
    let mut count = 0;
    while !answers.is_empty() {
        let (length, rest) = answers.split_first_chunk().ok_or_else(malformed)?;
        let length = u32::from_ne_bytes(*length) as usize;
        let (kind, _) = rest.split_first_chunk().ok_or_else(malformed)?;
        if i32::from(u16::from_ne_bytes(*kind)) == libc::NLMSG_ERROR {
            let error = answers.get(ANSWER - 4..ANSWER).and_then(|error| error.first_chunk());
            let error = i32::from_ne_bytes(*error.ok_or_else(malformed)?);
            if error != 0 {
                return Err(io::Error::from_raw_os_error(-error));
            }
            count += 1;
        }
        let next = length.max(ANSWER).next_multiple_of(4).min(answers.len());
        answers = &answers[next..];
    }
    Ok(count)
}

/// A string, as the kernel takes one.
fn text(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = 4 + value.len();
    let mut bytes = Vec::with_capacity(length.next_multiple_of(4));
    bytes.extend_from_slice(&(length as u16).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(length.next_multiple_of(4), 0);
    bytes
}

fn nested(kind: u16, attributes: &[u8]) -> Vec<u8> {
    attribute(libc::NLA_F_NESTED as u16 | kind, attributes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_say_how_long_they_are() {
        let named = attribute(LIST_SET, &text("oc"));
        assert_eq!(named, [&7_u16.to_ne_bytes()[..], &2_u16.to_ne_bytes(), b"oc\0\0"].concat());
        let outer = nested(LIST_ELEMENTS, &named);
        assert_eq!(outer[..4], [12_u16.to_ne_bytes(), 0x8003_u16.to_ne_bytes()].concat());
    }

    /// An answer about one message, of which a part is repeated.
    fn answer(error: i32) -> Vec<u8> {
        let header = [&40_u32.to_ne_bytes()[..], &2_u16.to_ne_bytes(), &[0; 10], &error.to_ne_bytes()];
        [&header.concat()[..], &[0; 20]].concat()
    }

    #[test]
    fn answers_are_counted_until_one_says_no() {
        assert_eq!(succeeded(&[answer(0), answer(0)].concat()).unwrap(), 2);
        let refused = succeeded(&[answer(0), answer(-libc::ENOENT)].concat()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::NotFound);
        for cut in 1..ANSWER {
            assert!(succeeded(&answer(0)[..cut]).is_err(), "{cut}");
        }
    }
}
