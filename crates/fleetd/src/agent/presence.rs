//! The machine's presence: signs of life as long as there is a session, and the farewell.

use fleet_link::Beat;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

/// How long an answer to a sign of life is waited for; and the pause before the next one when there was none.
const BEAT_DEADLINE: Duration = Duration::from_secs(5);
const BEAT_RETRY: Duration = Duration::from_millis(500);
/// How long giving up the machine's presence may take when it shuts down.
const LEAVE_DEADLINE: Duration = Duration::from_secs(2);

/// Gives signs of life as long as the session lasts: three within the time for which presence holds. Its own task, so that a long
/// batch does not look like death.
pub(super) async fn beat(beats: mpsc::Sender<Beat>) {
    loop {
        let (held, answer) = oneshot::channel();
        if beats.send(Beat { leaving: false, held }).await.is_err() {
            return;
        }
        let pause = match tokio::time::timeout(BEAT_DEADLINE, answer).await {
            Ok(Ok(held)) => held.ttl / 3,
            _ => BEAT_RETRY,
        };
        tokio::time::sleep(pause).await;
    }
}

/// Says that this machine shuts down, so that its units are placed elsewhere at once.
pub(super) async fn leave(beats: &mpsc::Sender<Beat>) {
    let (held, answer) = oneshot::channel();
    let said = async { beats.send(Beat { leaving: true, held }).await.is_ok() && answer.await.is_ok() };
    match tokio::time::timeout(LEAVE_DEADLINE, said).await {
        Ok(true) => info!("the machine shuts down: gave up its presence"),
        _ => warn!("the machine shuts down and no server answers: its presence runs out by itself"),
    }
}
