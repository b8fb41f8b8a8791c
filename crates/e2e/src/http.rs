//! A plain HTTP client for the API's unix socket that shows everything as it came, and can misbehave.

use anyhow::{Context, Result};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::{path::PathBuf, time::Duration};

/// The API on a unix socket.
#[derive(Clone, Debug)]
pub struct Http {
    socket: PathBuf,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// Header lines, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: String,
}

impl Answer {
    /// The first header of a name (in lower case).
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

impl Http {
    /// The API on this socket.
    pub fn new(socket: impl Into<PathBuf>) -> Http {
        Http { socket: socket.into() }
    }

    /// A connection for raw use.
    pub fn connect(&self) -> Result<UnixStream> {
        let stream = UnixStream::connect(&self.socket).context("unable to connect to the API")?;
        stream.set_read_timeout(Some(super::PATIENCE))?;
        stream.set_write_timeout(Some(Duration::from_secs(20)))?;
        Ok(stream)
    }

    /// Sends bytes and reads the answer to its end.
    pub fn raw(&self, bytes: &[u8]) -> Result<Answer> {
        let mut stream = self.connect()?;
        // The server may answer and close before it has read everything.
        let _ = stream.write_all(bytes);
        let mut reader = BufReader::new(stream);
        read_answer(&mut reader)
    }

    /// A request with headers (`Name: value` lines) and a body.
    pub fn send(&self, method: &str, path: &str, headers: &[&str], body: &str) -> Result<Answer> {
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: fleet\r\nConnection: close\r\n");
        for header in headers {
            head += &format!("{header}\r\n");
        }
        if !body.is_empty() || matches!(method, "PUT" | "POST" | "PATCH") {
            head += &format!("Content-Length: {}\r\n", body.len());
        }
        self.raw(format!("{head}\r\n{body}").as_bytes())
    }

    /// A request without a body.
    pub fn get(&self, path: &str) -> Result<Answer> {
        self.send("GET", path, &[], "")
    }

    /// A request with JSON.
    pub fn json(&self, method: &str, path: &str, body: &str) -> Result<Answer> {
        self.send(method, path, &["Content-Type: application/json"], body)
    }

    /// The lines of an event stream.
    pub fn events(&self, query: &str) -> Result<impl Iterator<Item = Result<String>> + use<>> {
        let mut stream = self.connect()?;
        write!(stream, "GET /fleet/v1/events{query} HTTP/1.0\r\nHost: fleet\r\n\r\n")?;
        Ok(BufReader::new(stream).lines().map(|line| Ok(line?)))
    }
}

fn read_answer(reader: &mut impl BufRead) -> Result<Answer> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.with_context(|| format!("no HTTP status line: {line:?}"))?;
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.trim_end().split_once(':') {
            Some((name, value)) => headers.push((name.to_ascii_lowercase(), value.trim().to_owned())),
            None => break,
        }
    }
    let chunked = headers.iter().any(|(name, value)| name == "transfer-encoding" && value == "chunked");
    let mut body = Vec::new();
    if chunked {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size)?;
            let size =
                usize::from_str_radix(size.trim(), 16).with_context(|| format!("chunk size {size:?}"))?;
            if size == 0 {
                break;
            }
            let mut chunk = vec![0; size + 2];
            reader.read_exact(&mut chunk)?;
            body.extend_from_slice(&chunk[..size]);
        }
    } else {
        let length =
            headers.iter().find(|(name, _)| name == "content-length").and_then(|(_, v)| v.parse().ok());
        match length {
            // An answer to HEAD has the length of a body that is not there.
            Some(length) => drop(reader.take(length).read_to_end(&mut body)?),
            None if matches!(status, 204 | 304) => {}
            None => drop(reader.read_to_end(&mut body)?),
        }
    }
    Ok(Answer { status, headers, body: String::from_utf8_lossy(&body).into_owned() })
}
