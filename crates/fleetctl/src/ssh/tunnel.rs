//! Connections to the server through ssh (`--tunnel`): `fleetctl fd-forward` on the other end for a unix socket, a
//! forwarded port for TCP. Each connection is an ssh of its own.
use super::options::{configured, host_and_port, options, port_options, quoted};
use crate::cli::Globals;
use fleet_api::client::{ByteStream, Connecting, Connector, Endpoint};
use std::io;
use std::pin::Pin;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::process::{ChildStdin, ChildStdout, Command};
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};

/// How many requests are under way at the same time: each connection costs a login, so they share few.
pub(crate) const AT_ONCE: usize = 3;
/// How many connections may log in at the same time: sshd drops some of them when more than ten do.
const LOGINS: usize = 4;
/// An ssh whose other end is gone is given up after three times this long, seconds.
const ALIVE: u32 = 15;

/// The way through `--tunnel`.
pub(crate) struct Tunnel {
    globals: Globals,
    /// What is to be done there: the last arguments of ssh.
    end: Vec<String>,
    /// All arguments of ssh, which take a while to find out.
    arguments: OnceCell<Vec<String>>,
    logins: Arc<Semaphore>,
}

impl Tunnel {
    pub(crate) fn new(globals: &Globals, endpoint: &Endpoint) -> Result<Self, String> {
        let end = end(host_and_port(&globals.tunnel).0, endpoint)?;
        let logins = Arc::new(Semaphore::new(LOGINS));
        Ok(Tunnel { globals: globals.clone(), end, arguments: OnceCell::new(), logins })
    }

    async fn arguments(&self) -> Vec<String> {
        let (host, port) = host_and_port(&self.globals.tunnel);
        let mut arguments = options(&self.globals, &configured(&self.globals, host, port).await);
        arguments.extend(port_options(port));
        arguments.extend(["-o".to_owned(), format!("ServerAliveInterval={ALIVE}"), "-T".to_owned()]);
        arguments.extend(self.end.iter().cloned());
        arguments
    }
}

/// What ssh is to do on a host to reach an endpoint there.
fn end(host: &str, endpoint: &Endpoint) -> Result<Vec<String>, String> {
    let host = host.to_owned();
    match endpoint {
        Endpoint::Unix { path } => {
            let path = quoted(&path.to_string_lossy());
            Ok(vec!["--".to_owned(), host, format!("fleetctl fd-forward {path}")])
        }
        Endpoint::Http { host: target, port, .. } => {
            let target = if target.contains(':') { format!("[{target}]") } else { target.clone() };
            Ok(vec!["-W".to_owned(), format!("{target}:{port}"), "--".to_owned(), host])
        }
        Endpoint::Other { scheme, .. } => Err(format!("unsupported protocol scheme {scheme:?}")),
    }
}

impl Connector for Tunnel {
    fn connect(&self) -> Connecting<'_> {
        Box::pin(async {
            let login = self.logins.clone().acquire_owned().await.ok();
            let arguments = self.arguments.get_or_init(|| self.arguments()).await;
            let mut child = Command::new("ssh")
                .args(arguments)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .kill_on_drop(true)
                .spawn()
                .map_err(|error| format!("failed initializing SSH client: {}", super::not_started(&error)))?;
            let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
                return Err("failed initializing SSH client: ssh has no stdin".to_owned());
            };
            let exit = Box::pin(async move { child.wait().await });
            let host = self.globals.tunnel.clone();
            Ok(Box::new(Tunnelled { stdin, stdout, exit, host, login, heard: false }) as Box<dyn ByteStream>)
        })
    }
}

/// The stream of a running ssh, which ends with it.
struct Tunnelled {
    stdin: ChildStdin,
    stdout: ChildStdout,
    /// How it ended; holds the process, and kills it when dropped.
    exit: Pin<Box<dyn Future<Output = io::Result<ExitStatus>> + Send>>,
    host: String,
    /// Held until something came from the other end: then ssh has logged in.
    login: Option<OwnedSemaphorePermit>,
    heard: bool,
}

/// Why nothing came through an ssh that has ended.
fn ended(host: &str, status: ExitStatus) -> String {
    match super::exit_code(status) {
        255 => format!("ssh to {host} failed (exit code 255)"),
        127 => format!("ssh to {host} found no fleetctl there (exit code 127)"),
        code => format!("ssh to {host} ended with exit code {code}"),
    }
}

impl AsyncRead for Tunnelled {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stdout).poll_read(cx, buf))?;
        if buf.filled().len() > before {
            self.heard = true;
            self.login = None;
        } else if !self.heard && buf.remaining() > 0 {
            let status = ready!(self.exit.as_mut().poll(cx))?;
            self.heard = true;
            return Poll::Ready(Err(io::Error::other(ended(&self.host, status))));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tunnelled {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match ready!(Pin::new(&mut self.stdin).poll_write(cx, buf)) {
            // ssh has ended: reading tells how.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Poll::Ready(Ok(buf.len())),
            written => Poll::Ready(written),
        }
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stdin).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stdin).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn ends() {
        let end = |endpoint: &str| end("box", &Endpoint::parse(endpoint).unwrap()).map(|it| it.join(" "));
        assert_eq!(
            end("unix:///run/fleet.sock").as_deref(),
            Ok("-- box fleetctl fd-forward /run/fleet.sock")
        );
        assert_eq!(end("unix:///a b").as_deref(), Ok("-- box fleetctl fd-forward '/a b'"));
        assert_eq!(end("http://127.0.0.1:49153").as_deref(), Ok("-W 127.0.0.1:49153 -- box"));
        assert_eq!(end("http://[::1]:7").as_deref(), Ok("-W [::1]:7 -- box"));
        assert!(end("ftp://x").is_err());
    }

    #[test]
    fn why_nothing_came() {
        let of = |code: i32| ended("box", ExitStatus::from_raw(code << 8));
        assert_eq!(of(255), "ssh to box failed (exit code 255)");
        assert_eq!(of(127), "ssh to box found no fleetctl there (exit code 127)");
        assert_eq!(of(1), "ssh to box ended with exit code 1");
    }
}
