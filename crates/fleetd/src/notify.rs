//! What fleetd tells the service manager that started it: ready, stopping, a line of status, and signs of life.
//!
//! The protocol is sd_notify(3): a datagram of `NAME=VALUE` lines to the socket named by NOTIFY_SOCKET. Without
//! that variable nothing is sent, so that fleetd runs under anything.
use crate::config::Environment;
use std::{
    io,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram},
    },
    time::Duration,
};
use tokio_util::sync::CancellationToken;

/// The way to the service manager.
#[derive(Clone, Debug, Default)]
pub struct Notifier {
    socket: Option<SocketAddr>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// From NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID; `pid` is that of this process.
    pub fn new(environment: &Environment, pid: u32) -> Self {
        let number = |name: &str| environment.get(name).and_then(|text| text.parse::<u64>().ok());
        let ours = match environment.get("WATCHDOG_PID") {
            Some(_) => number("WATCHDOG_PID") == Some(u64::from(pid)),
            None => true,
        };
        let socket = environment.get("NOTIFY_SOCKET").and_then(|text| match text.strip_prefix('@') {
            Some(name) => SocketAddr::from_abstract_name(name).ok(),
            None if text.starts_with('/') => SocketAddr::from_pathname(text).ok(),
            None => None,
        });
        let watchdog = number("WATCHDOG_USEC").filter(|usec| ours && *usec > 0).map(Duration::from_micros);
        Notifier { watchdog: watchdog.filter(|_| socket.is_some()), socket }
    }

    /// After this much silence the service manager kills fleetd; none when it does not watch.
    pub fn watchdog_timeout(&self) -> Option<Duration> {
        self.watchdog
    }

    /// fleetd is up: the API answers and units are looked after.
    pub fn ready(&self, status: &str) {
        self.send(&format!("READY=1\nSTATUS={}\n", one_line(status)));
    }

    /// fleetd is on its way down.
    pub fn stopping(&self, status: &str) {
        self.send(&format!("STOPPING=1\nSTATUS={}\n", one_line(status)));
    }

    /// A line for `systemctl status fleetd`.
    pub fn status(&self, status: &str) {
        self.send(&format!("STATUS={}\n", one_line(status)));
    }

    /// Shows signs of life, twice in the time the service manager waits for one, as long as `alive` says so.
    /// Returns when cancelled, or at once when nobody watches.
    pub async fn watchdog(&self, alive: impl Fn() -> bool, cancel: CancellationToken) {
        let Some(timeout) = self.watchdog else { return };
        let mut beat = tokio::time::interval(timeout / 2);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                _ = beat.tick() => {}
            }
            if alive() {
                self.send("WATCHDOG=1\n");
            } else {
                tracing::error!(
                    "a part of fleetd does not answer; the service manager will restart fleetd soon"
                );
            }
        }
    }

    /// Failing to notify must not keep fleetd from its work, so it is only logged.
    fn send(&self, message: &str) {
        let Some(address) = &self.socket else { return };
        if let Err(error) = send(address, message) {
            tracing::debug!(%error, "the service manager can't be notified");
        }
    }
}

fn send(address: &SocketAddr, message: &str) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    // A full queue of the receiver must not stop us.
    socket.set_nonblocking(true)?;
    socket.send_to_addr(message.as_bytes(), address).map(drop)
}

/// A status is one line; the next would be taken for another message.
fn one_line(text: &str) -> String {
    text.replace(|c: char| c.is_control(), " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    struct Manager {
        socket: UnixDatagram,
        _directory: tempfile::TempDir,
        environment: Environment,
    }

    fn manager() -> Manager {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        let environment = [("NOTIFY_SOCKET".to_owned(), path.to_str().unwrap().to_owned())].into();
        Manager { socket, _directory: directory, environment }
    }

    impl Manager {
        fn received(&self) -> Option<String> {
            let mut buffer = [0; 512];
            let length = self.socket.recv(&mut buffer).ok()?;
            Some(String::from_utf8(buffer[..length].to_vec()).unwrap())
        }
        fn with(mut self, name: &str, value: &str) -> Self {
            self.environment.insert(name.into(), value.into());
            self
        }
    }

    #[test]
    fn messages() {
        let manager = manager();
        let notifier = Notifier::new(&manager.environment, 1);
        notifier.ready("3 units");
        assert_eq!(manager.received().unwrap(), "READY=1\nSTATUS=3 units\n");
        notifier.status("a\nWATCHDOG=trigger");
        assert_eq!(manager.received().unwrap(), "STATUS=a WATCHDOG=trigger\n");
        notifier.stopping("bye");
        assert_eq!(manager.received().unwrap(), "STOPPING=1\nSTATUS=bye\n");
        assert_eq!(manager.received(), None);
    }

    #[test]
    fn an_abstract_socket() {
        let name = format!("fleetd-test-{}", std::process::id());
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        Notifier::new(&[("NOTIFY_SOCKET".to_owned(), format!("@{name}"))].into(), 1).status("x");
        let mut buffer = [0; 64];
        assert_eq!(socket.recv(&mut buffer).unwrap(), "STATUS=x\n".len());
    }

    #[test]
    fn nobody_listens() {
        Notifier::default().ready("x");
        for socket in ["", "relative", "/nowhere/at/all", "@"] {
            Notifier::new(&[("NOTIFY_SOCKET".to_owned(), socket.to_owned())].into(), 1).ready("x");
        }
    }

    #[test]
    fn whether_there_is_a_watchdog() {
        let timeout = |pairs: &[(&str, &str)]| {
            let mut manager = manager();
            for (name, value) in pairs {
                manager = manager.with(name, value);
            }
            Notifier::new(&manager.environment, 42).watchdog_timeout()
        };
        assert_eq!(timeout(&[("WATCHDOG_USEC", "30000000")]), Some(Duration::from_secs(30)));
        assert_eq!(
            timeout(&[("WATCHDOG_USEC", "5"), ("WATCHDOG_PID", "42")]),
            Some(Duration::from_micros(5))
        );
        assert_eq!(timeout(&[("WATCHDOG_USEC", "5"), ("WATCHDOG_PID", "43")]), None);
        assert_eq!(timeout(&[("WATCHDOG_USEC", "5"), ("WATCHDOG_PID", "x")]), None);
        assert_eq!(timeout(&[("WATCHDOG_USEC", "0")]), None);
        assert_eq!(timeout(&[]), None);
        assert_eq!(
            Notifier::new(&[("WATCHDOG_USEC".to_owned(), "5".to_owned())].into(), 1).watchdog_timeout(),
            None
        );
    }

    #[tokio::test(start_paused = true)]
    async fn signs_of_life_end_with_life() {
        let manager = manager().with("WATCHDOG_USEC", "10000000");
        let notifier = Notifier::new(&manager.environment, 1);
        let (alive, cancel) = (AtomicBool::new(true), CancellationToken::new());
        let watchdog = notifier.watchdog(|| alive.load(Ordering::Relaxed), cancel.clone());
        let observer = async {
            let beat = Duration::from_secs(5);
            tokio::time::sleep(Duration::from_secs(1)).await;
            for _ in 0..3 {
                assert_eq!(manager.received().unwrap(), "WATCHDOG=1\n");
                assert_eq!(manager.received(), None);
                tokio::time::sleep(beat).await;
            }
            manager.received().unwrap();
            alive.store(false, Ordering::Relaxed);
            tokio::time::sleep(beat * 3).await;
            assert_eq!(manager.received(), None);
            alive.store(true, Ordering::Relaxed);
            tokio::time::sleep(beat).await;
            assert_eq!(manager.received().unwrap(), "WATCHDOG=1\n");
            cancel.cancel();
        };
        tokio::join!(watchdog, observer);
    }
}
