//! A server of the API on a unix socket whose answers a test makes up, and the program asking it.
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

/// Answers a request: method, path with query below /fleet/v1/, body; status and JSON (null: none).
type Answer = dyn FnMut(&str, &str, &str) -> (u16, Value) + Send;

/// The server. Its threads end with the test's process.
pub(crate) struct Server {
    directory: tempfile::TempDir,
}

impl Server {
    pub(crate) fn new(answer: impl FnMut(&str, &str, &str) -> (u16, Value) + Send + 'static) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("fleet.sock")).unwrap();
        let answer: Arc<Mutex<Answer>> = Arc::new(Mutex::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let answer = answer.clone();
                std::thread::spawn(move || converse(stream, &answer));
            }
        });
        Server { directory }
    }

    /// Where the program runs, and its socket is.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Runs fleetctl; what it said on stdout and stderr, and its exit code.
    pub(crate) fn fleetctl(&self, arguments: &[&str]) -> (String, String, i32) {
        let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_fleetctl"))
            .arg(format!("--endpoint=unix://{}", self.directory().join("fleet.sock").display()))
            .args(arguments)
            .current_dir(self.directory())
            // For a program that a test puts in the place of another.
            .env("PATH", format!("{}:/usr/bin:/bin", self.directory().display()))
            .env("HOME", self.directory())
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (text(stdout), text(stderr), status.code().unwrap())
    }
}

fn converse(stream: UnixStream, answer: &Mutex<Answer>) -> Option<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut request = String::new();
        stream.read_line(&mut request).ok()?;
        let mut words = request.split(' ');
        let (method, path) = (words.next()?.to_owned(), words.next()?.strip_prefix("/fleet/v1/")?.to_owned());
        let mut length = 0;
        loop {
            let mut line = String::new();
            stream.read_line(&mut line).ok()?;
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().ok()?;
            }
            if line == "\r\n" {
                break;
            }
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).ok()?;
        let (status, answer) = answer.lock().ok()?(&method, &path, std::str::from_utf8(&body).ok()?);
        let text = if answer.is_null() { String::new() } else { answer.to_string() };
        let length =
            if status == 204 { String::new() } else { format!("Content-Length: {}\r\n", text.len()) };
        stream.get_mut().write_all(format!("HTTP/1.1 {status} X\r\n{length}\r\n{text}").as_bytes()).ok()?;
    }
}
