//! QEMU's stub for debuggers, which writes to a guest's memory as the guest's own CPU does: code that was translated of
//! what is written over is forgotten. A write from outside the process would leave it.
//!
//! The protocol is that of GDB's remote targets (gdb/doc, "Remote Protocol"), of which two packets are needed: the
//! one by which QEMU's addresses are physical ones (docs/system/gdb.rst), and the write.

use std::{fmt::Write as _, io, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    time::timeout,
};

use crate::driver::{
    home::{DEBUG, Home},
    vmm::{Patch, VmmError},
};

/// Bytes that a packet writes: as hex digits, with address and frame, it fits QEMU's 4096 (`MAX_PACKET_LENGTH`,
/// gdbstub/internals.h).
const MOST: usize = 2000;
/// Some megabytes take tens of milliseconds.
const WITHIN: Duration = Duration::from_secs(10);
/// What a packet is answered that was done.
const DONE: &[u8] = b"$OK#9a";
/// What is sent of packets at a time.
const SENT_AT_ONCE: usize = 64 << 10;

/// Writes `patches` to the memory of the VM in `home`, which is paused.
///
/// # Errors
///
/// [`VmmError`] if the stub does not do as it is told: then some of it may be written.
pub async fn write(home: &Home, patches: &[Patch]) -> Result<(), VmmError> {
    let stream = home.connect(DEBUG).await.map_err(VmmError::Lost)?;
    match timeout(WITHIN, exchange(stream, patches)).await {
        Ok(done) => done.map_err(VmmError::Lost),
        Err(_) => Err(VmmError::Late { command: "to write memory", within: WITHIN }),
    }
}

async fn exchange(stream: UnixStream, patches: &[Patch]) -> io::Result<()> {
    let (mut answers, mut packets) = stream.into_split();
    let count = 1 + patches.iter().map(|patch| patch.bytes.len().div_ceil(MOST)).sum::<usize>();
    // Both at once: neither end's buffer holds all that is said.
    let say = async {
        let mut text = String::with_capacity(SENT_AT_ONCE + 3 * MOST);
        packet(&mut text, |text| text.push_str("Qqemu.PhyMemMode:1"));
        for patch in patches {
            for (number, bytes) in patch.bytes.chunks(MOST).enumerate() {
                let address = patch.address + (number * MOST) as u64;
                packet(&mut text, |text| {
                    // Into memory: never fails.
                    let _ = write!(text, "M{address:x},{:x}:", bytes.len());
                    text.push_str(&hex::encode(bytes));
                });
                if text.len() >= SENT_AT_ONCE {
                    packets.write_all(text.as_bytes()).await?;
                    text.clear();
                }
            }
        }
        packets.write_all(text.as_bytes()).await
    };
    let hear = async {
        let (mut heard, mut done) = (Vec::new(), 0);
        let mut buffer = vec![0; 16 << 10];
        while done < count {
            match answers.read(&mut buffer).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => heard.extend_from_slice(&buffer[..read]),
            }
            // An acknowledgement, then the answer.
            while let Some(length) = heard.iter().position(|&byte| byte == b'#').map(|at| at + 3)
                && length <= heard.len()
            {
                let answer: Vec<u8> = heard.drain(..length).skip_while(|&byte| byte == b'+').collect();
                if answer != DONE {
                    let answer = String::from_utf8_lossy(&answer).into_owned();
                    return Err(io::Error::other(format!("the stub answers {answer:?}")));
                }
                done += 1;
            }
        }
        Ok(())
    };
    tokio::try_join!(say, hear).map(drop)
}

/// Appends a packet: its contents between `$` and `#`, and the sum of their bytes.
fn packet(text: &mut String, contents: impl FnOnce(&mut String)) {
    text.push('$');
    let start = text.len();
    contents(text);
    let sum = text.as_bytes()[start..].iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    // As above.
    let _ = write!(text, "#{sum:02x}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_is_framed_and_summed() {
        let mut text = String::new();
        packet(&mut text, |text| text.push_str("OK"));
        assert_eq!(text.as_bytes(), DONE);
    }

    /// A firmware that copies a loop to address 1000 and goes there: it writes the letter A to the serial port, waits and
    /// begins again.
    fn firmware() -> Vec<u8> {
        let code: [u8; 14] =
            [0xb0, b'A', 0xba, 0xf8, 0x03, 0xee, 0xb9, 0xff, 0xff, 0xe2, 0xfe, 0xeb, 0xf3, 0x90];
        // xor ax, ax; mov ds, ax
        let mut rom = vec![0x31, 0xc0, 0x8e, 0xd8];
        for (at, word) in code.as_chunks::<2>().0.iter().enumerate() {
            // mov word [0x1000 + 2 * at], word
            rom.extend([0xc7, 0x06, 2 * at as u8, 0x10, word[0], word[1]]);
        }
        // jmp 0:0x1000
        rom.extend([0xea, 0x00, 0x10, 0x00, 0x00]);
        rom.resize(64 << 10, 0);
        // Where a CPU begins: 16 bytes before the end. jmp to the first byte.
        rom[0xfff0..0xfff3].copy_from_slice(&[0xe9, 0x0d, 0x00]);
        rom
    }

    #[tokio::test]
    async fn code_that_is_written_over_is_translated_anew() {
        use std::process::Stdio;
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        std::fs::write(path("firmware"), firmware()).unwrap();
        let mut qemu = tokio::process::Command::new(crate::driver::qemu::PROGRAM)
            .args(["-M", "microvm,acpi=off", "-m", "16M", "-accel", "tcg", "-display", "none"])
            .args(["-nodefaults", "-no-user-config", "-bios", &path("firmware")])
            .args(["-chardev", &format!("file,id=letters,path={}", path("letters"))])
            .args(["-serial", "chardev:letters", "-qmp", "stdio"])
            .args(["-gdb", &format!("unix:{},server=on,wait=off", path("debug"))])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let letters = || std::fs::read(path("letters")).unwrap_or_default();
        let seen = async |letter: u8| {
            let look = async {
                while !letters().ends_with(&[letter]) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            timeout(Duration::from_secs(30), look).await.expect("it runs")
        };
        seen(b'A').await;
        // It is halted by that.
        let stream = UnixStream::connect(path("debug")).await.unwrap();
        exchange(stream, &[Patch { address: 0x1001, bytes: vec![b'B'] }]).await.unwrap();
        let go_on = b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"cont\"}\n";
        qemu.stdin.as_mut().unwrap().write_all(go_on).await.unwrap();
        seen(b'B').await;
        qemu.kill().await.unwrap();
    }

    /// A stub that answers every packet, the one of that number with an error.
    async fn stub(mut stream: UnixStream, refused: usize) -> Vec<u8> {
        let (mut heard, mut answered) = (Vec::new(), 0);
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = stream.read(&mut buffer).await {
            heard.extend_from_slice(&buffer[..read]);
            while answered < heard.iter().filter(|&&byte| byte == b'#').count() {
                let answer: &[u8] = if answered == refused { b"+$E14#aa" } else { b"+$OK#9a" };
                stream.write_all(answer).await.unwrap();
                answered += 1;
            }
        }
        heard
    }

    #[tokio::test]
    async fn memory_is_written_in_packets_and_a_refusal_is_told() {
        let patches = [
            Patch { address: 0x1000, bytes: vec![0xab; MOST + 1] },
            Patch { address: 0x9000, bytes: b"xy".to_vec() },
        ];
        for refused in [usize::MAX, 2] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let stub = tokio::spawn(stub(theirs, refused));
            let written = exchange(ours, &patches).await;
            let heard = String::from_utf8(stub.await.unwrap()).unwrap();
            assert_eq!(written.is_ok(), refused == usize::MAX, "{written:?}");
            if written.is_ok() {
                let packets: Vec<_> = heard.split('$').skip(1).collect();
                assert_eq!(packets.len(), 4);
                assert!(packets[1].starts_with("M1000,7d0:abab"));
                assert!(packets[2].starts_with("M17d0,1:ab#"));
                assert!(packets[3].starts_with("M9000,2:7879#"));
            }
        }
    }
}
