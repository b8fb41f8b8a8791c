//! How a connection that is cut without a word is found out.
//!
//! Each side pings the other over HTTP/2 when it has heard nothing for a while, and gives up when the answer
//! does not come in time. TCP's own keep-alive would not do: it rests while data is unacknowledged. For that case
//! the kernel is told the same limit (TCP_USER_TIMEOUT), so that buffers of a dead connection are freed too.

use std::time::Duration;
use tokio::net::TcpStream;

/// When a silent peer is asked, and how long it may take to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeepAlive {
    /// Silence after which the peer is pinged.
    pub after: Duration,
    /// How long it may take to answer.
    pub deadline: Duration,
}

impl Default for KeepAlive {
    fn default() -> Self {
        KeepAlive { after: Duration::from_secs(5), deadline: Duration::from_secs(5) }
    }
}

impl KeepAlive {
    /// Prepares a fresh connection: small messages go at once, and unacknowledged data has a deadline.
    pub(crate) fn prepare(&self, stream: &TcpStream) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        let limit = (self.after + self.deadline).as_millis();
        rustix::net::sockopt::set_tcp_user_timeout(stream, u32::try_from(limit).unwrap_or(u32::MAX))?;
        Ok(())
    }

    /// For a connection without pings, whose peer may stop reading for long without being gone (a log that is looked at page
    /// by page): the kernel finds out that it is gone.
    pub(crate) fn prepare_reader(stream: &TcpStream) -> std::io::Result<()> {
        rustix::net::sockopt::set_tcp_user_timeout(stream, 0)?;
        rustix::net::sockopt::set_socket_keepalive(stream, true)?;
        rustix::net::sockopt::set_tcp_keepidle(stream, Duration::from_secs(30))?;
        rustix::net::sockopt::set_tcp_keepintvl(stream, Duration::from_secs(10))?;
        rustix::net::sockopt::set_tcp_keepcnt(stream, 3)?;
        Ok(())
    }
}
