//! Connections that speak HTTP/1.1: users, on their way to the API.
//!
//! Which of the two a connection is, it says in the TLS handshake (ALPN): agents offer `h2` only, everybody else gets `http/1.1` or
//! nothing. A guest is a stranger, with a stranger's bounds, until the API has found out who it is and calls [`Visitor::admit`].

use super::{Phase, refusals::RefusalLog};
use crate::ca::ClientCertificate;
use std::fmt;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

/// A guest's connection, after the handshake.
pub type GuestStream = tokio_rustls::server::TlsStream<TcpStream>;

type Served = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What serves guests, until their connection ends or the daemon stops.
#[derive(Clone)]
pub struct Guests(Arc<dyn Fn(GuestStream, Visitor) -> Served + Send + Sync>);

impl Guests {
    /// Guests are served by this.
    pub fn new<F>(serve: impl Fn(GuestStream, Visitor) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        Guests(Arc::new(move |stream, visitor| Box::pin(serve(stream, visitor))))
    }

    pub(super) fn serve(&self, stream: GuestStream, visitor: Visitor) -> Served {
        (self.0)(stream, visitor)
    }
}

impl fmt::Debug for Guests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Guests")
    }
}

/// Who is at the other end of a guest's connection.
#[derive(Debug)]
pub struct Visitor {
    pub(super) address: SocketAddr,
    pub(super) certificate: Option<ClientCertificate>,
    pub(super) phase: watch::Sender<Phase>,
    pub(super) slots: Arc<Semaphore>,
    pub(super) slot: Mutex<Option<OwnedSemaphorePermit>>,
    pub(super) refusals: Arc<RefusalLog>,
}

impl Visitor {
    /// Where the connection comes from.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The certificate that was shown, which is of this cluster and valid. It may be a machine's.
    pub fn certificate(&self) -> Option<&ClientCertificate> {
        self.certificate.as_ref()
    }

    /// Takes the connection out of the strangers' bounds: it is known who this is. False when there are too many guests.
    pub fn admit(&self) -> bool {
        let mut slot = self.slot.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            *slot = self.slots.clone().try_acquire_owned().ok();
        }
        if slot.is_some() {
            self.phase.send_if_modified(|phase| std::mem::replace(phase, Phase::Session) == Phase::Waiting);
        }
        slot.is_some()
    }

    /// Logs that the peer was refused, and why, once a minute. The reason must hold nothing that the peer chose freely, and no secret.
    pub fn refused(&self, reason: &str) {
        self.refusals.refused(self.address, reason);
    }
}
