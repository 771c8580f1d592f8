//! `oc port-forward`, against a mesh whose ports behave in every way a port can.

use std::{
    io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _},
    net::{Shutdown, TcpStream},
    process::{Child, ChildStderr, Stdio},
};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::fake::{
    sessions::noise,
    shell::{Shell, signal, text},
};

/// Ports that are forwarded, and where to connect to.
struct Forwarded {
    child: Child,
    addresses: Vec<String>,
    stderr: BufReader<ChildStderr>,
}

impl Forwarded {
    fn new(shell: &Shell, ports: &[u16]) -> Self {
        let id = shell.json("create")["sandboxID"].as_str().unwrap().to_owned();
        let forwards: Vec<_> = ports.iter().map(|port| format!("0:{port}")).collect();
        let mut child = shell
            .command(&format!("port-forward {id} {}", forwards.join(" ")))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap()).lines();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let addresses = ports
            .iter()
            .map(|port| {
                let line = stdout.next().unwrap().unwrap();
                let (address, remote) = line.split_once(" -> ").unwrap();
                assert_eq!(remote, format!("{id}:{port}"));
                address.to_owned()
            })
            .collect();
        Self { child, addresses, stderr }
    }

    fn connect(&self, index: usize) -> TcpStream {
        TcpStream::connect(&self.addresses[index]).unwrap()
    }
}

impl Drop for Forwarded {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // A second panic would end the other tests of this binary too.
            let _ = self.child.kill();
            let _ = self.child.wait();
            return;
        }
        signal(&self.child, Signal::SIGINT);
        assert_eq!(self.child.wait().unwrap().code(), Some(130));
    }
}

#[test]
fn bytes_go_both_ways_and_each_side_ends_by_itself() {
    let shell = Shell::new();
    let forwarded = Forwarded::new(&shell, &[7, 11]);
    let bytes = noise(3_000_000);
    let mut stream = forwarded.connect(0);
    let writer = {
        let (mut stream, bytes) = (stream.try_clone().unwrap(), bytes.clone());
        std::thread::spawn(move || {
            stream.write_all(&bytes).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        })
    };
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    writer.join().unwrap();
    assert!(back == [bytes.as_slice(), b"bye"].concat());

    // One that has said all there is to say still listens.
    let mut stream = forwarded.connect(1);
    let mut back = String::new();
    stream.read_to_string(&mut back).unwrap();
    assert_eq!(back, "hello");
    stream.write_all(b"late").unwrap();
    drop(stream);
    shell.mesh.until("it is heard", |state| state.forwarded.contains(&(11, b"late".to_vec())));
}

#[test]
fn a_connection_that_fails_is_told_and_others_go_on() {
    let shell = Shell::new();
    let mut forwarded = Forwarded::new(&shell, &[9, 7, 13]);
    // It may break before it is known here to have come about.
    let address = &forwarded.addresses[0];
    let refused = TcpStream::connect(address).and_then(|mut stream| stream.read(&mut [0])).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionReset);
    let mut line = String::new();
    forwarded.stderr.read_line(&mut line).unwrap();
    assert_eq!(line, "oc: port 9: nobody listens on port 9 (PORT_NOT_LISTENING)\n");

    let mut stream = forwarded.connect(2);
    stream.write_all(b"x").unwrap();
    let mut back = Vec::new();
    // That the connection broke must not look like its end.
    assert_eq!(stream.read_to_end(&mut back).unwrap_err().kind(), ErrorKind::ConnectionReset);

    let mut stream = forwarded.connect(1);
    stream.write_all(b"ping").unwrap();
    let mut back = [0; 4];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"ping");
}

#[test]
fn many_connections_are_open_at_once() {
    let shell = Shell::new();
    let forwarded = Forwarded::new(&shell, &[7]);
    let mut streams: Vec<_> = (0..100).map(|_| forwarded.connect(0)).collect();
    for (index, stream) in streams.iter_mut().enumerate() {
        stream.write_all(&[u8::try_from(index).unwrap()]).unwrap();
    }
    for (index, stream) in streams.iter_mut().enumerate() {
        let mut back = [0];
        stream.read_exact(&mut back).unwrap();
        assert_eq!(usize::from(back[0]), index);
    }
}

#[test]
fn what_cannot_be_forwarded_is_refused_at_once() {
    let shell = Shell::new();
    assert_eq!(shell.refused("port-forward sb-none 0:80"), (3, "SANDBOX_NOT_FOUND".to_owned()));
    assert_eq!(shell.refused("port-forward sb-1 80:none").0, 2);
    assert_eq!(shell.refused("port-forward sb-1").0, 2);
    let id = shell.json("create")["sandboxID"].as_str().unwrap().to_owned();
    let taken = shell.mesh.address.port();
    let output = shell.run(&format!("port-forward {id} {taken}:80"));
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("cannot listen on 127.0.0.1"));
}

#[test]
fn programs_read_where_to_connect_to() {
    let shell = Shell::new();
    let id = shell.json("create")["sandboxID"].as_str().unwrap().to_owned();
    let mut child =
        shell.command(&format!("port-forward {id} 0:7 --json")).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let line: Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&line["address"], &line["port"]), (&"127.0.0.1".into(), &7.into()));
    let port = u16::try_from(line["localPort"].as_u64().unwrap()).unwrap();
    TcpStream::connect(("127.0.0.1", port)).unwrap();
    signal(&child, Signal::SIGINT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
}
