//! The journals of several units or copies as one, by time, with the machine and the unit in front of each line.
//!
//! Every source has a task that asks its machine and reads what comes ([`wire`]); [`merge`] decides which line is next,
//! [`look`] how it is shown. Between a task and the merge is a short queue: a source whose turn it is not waits, and so
//! does its machine. What cannot be read is told on stderr, with its unit and machine, and the others go on.
pub(crate) mod look;
mod merge;
mod wire;

use crate::context::{Context, INTERRUPTED, print_line};
use crate::copies::Copy;
use anyhow::Result;
use fleet_api::client::{Client, Error, JournalQuery};
use jiff::tz::TimeZone;
use look::{Form, Look};
use merge::Merge;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use wire::{Entry, Reader};

/// The most sources that are read at the same time.
pub(crate) const MOST: usize = 256;
/// How many sources are asked at the same time.
const ASKING: usize = 16;
/// Entries of a source that wait for their turn.
const WAITING: usize = 32;
/// Without follow: how long a source may send nothing that has not ended.
const SILENCE: Duration = Duration::from_secs(30);
/// How much output is gathered before it is written, bytes.
const BATCH: usize = 64 << 10;

/// What comes from a source, with the time it arrived.
enum News {
    Entry(Entry, Instant),
    /// It has ended with this exit code of journalctl.
    Ended(i32),
    Failed(Error),
}

/// Shows the journals of these copies; the exit code.
pub(crate) async fn show(
    context: &Context,
    copies: &[Copy],
    form: Form,
    query: &JournalQuery,
) -> Result<i32> {
    let mut interrupts = signal(SignalKind::interrupt())?;
    let look = Look::new(form, TimeZone::system(), copies);
    let asking = Arc::new(Semaphore::new(ASKING));
    // They end when this does.
    let mut tasks = JoinSet::new();
    let mut queues = Vec::new();
    for Copy { unit, machine } in copies {
        let (news, queue) = mpsc::channel(WAITING);
        let query = JournalQuery { machine: Some(machine.clone()), ..query.clone() };
        tasks.spawn(read(context.client.clone(), unit.clone(), query, form, asking.clone(), news));
        queues.push(queue);
    }
    let merge = Merge::new(copies.len(), query.follow);
    let mut sources = Sources { context, copies, merge, queues, start: Instant::now(), code: 0 };
    let mut stdout = tokio::io::stdout();
    let (mut out, mut any) = (Vec::new(), false);
    loop {
        sources.take_all().await;
        if let Some((source, entry)) = sources.merge.next(sources.start.elapsed()) {
            any = true;
            look.write(&mut out, source, &entry);
            if out.len() < BATCH {
                continue;
            }
        }
        if out.is_empty() {
            if sources.merge.is_over() {
                break;
            }
            let due = sources.merge.due().map(|due| sources.start + due);
            let due = async { due.map(sleep_until).unwrap_or_else(|| sleep(Duration::MAX)).await };
            tokio::select! {
                _ = interrupts.recv() => return Ok(INTERRUPTED),
                (source, news) = sources.arrival() => sources.take(source, news).await,
                () = due => {}
            }
            continue;
        }
        let written = async {
            stdout.write_all(&out).await?;
            stdout.flush().await
        };
        tokio::select! {
            _ = interrupts.recv() => return Ok(INTERRUPTED),
            written = written => written?,
        }
        out.clear();
    }
    if !any && sources.code == 0 && !matches!(form, Form::Cat | Form::Json) {
        print_line("-- No entries --")?;
    }
    Ok(sources.code)
}

/// What is read, and what has come of it.
struct Sources<'a> {
    context: &'a Context,
    copies: &'a [Copy],
    merge: Merge<Entry>,
    queues: Vec<mpsc::Receiver<News>>,
    start: Instant,
    code: i32,
}

impl Sources<'_> {
    /// Takes what has arrived, of all of which the merge wants something.
    async fn take_all(&mut self) {
        for source in 0..self.queues.len() {
            if !self.merge.wants(source) {
                continue;
            }
            match self.queues[source].try_recv() {
                Ok(news) => self.take(source, Some(news)).await,
                Err(mpsc::error::TryRecvError::Empty) => {}
                Err(mpsc::error::TryRecvError::Disconnected) => self.take(source, None).await,
            }
        }
    }

    /// Waits for something of which the merge wants it. Cancel-safe.
    async fn arrival(&mut self) -> (usize, Option<News>) {
        let (merge, queues) = (&self.merge, &mut self.queues);
        poll_fn(|cx| {
            for (source, queue) in queues.iter_mut().enumerate() {
                if merge.wants(source)
                    && let Poll::Ready(news) = queue.poll_recv(cx)
                {
                    return Poll::Ready((source, news));
                }
            }
            Poll::Pending
        })
        .await
    }

    async fn take(&mut self, source: usize, news: Option<News>) {
        match news {
            Some(News::Entry(entry, at)) => {
                return self.merge.offer(
                    source,
                    entry.stamp,
                    at.saturating_duration_since(self.start),
                    entry,
                );
            }
            Some(News::Ended(code)) if self.code == 0 => self.code = code,
            Some(News::Ended(_)) | None => {}
            Some(News::Failed(error)) => {
                let copy = &self.copies[source];
                let machine = self.context.legend(&copy.machine).await;
                let before =
                    format!("Error reading the journal of unit {} on machine {machine}: ", copy.unit);
                self.code = self.context.fail(&before, &error, "");
            }
        }
        self.merge.end(source);
    }
}

/// Reads one source to its end.
async fn read(
    client: Arc<Client>,
    unit: String,
    query: JournalQuery,
    form: Form,
    asking: Arc<Semaphore>,
    news: mpsc::Sender<News>,
) {
    let last = match entries(&client, &unit, &query, form, &asking, &news).await {
        Ok(Some(code)) => News::Ended(code),
        // Nobody wants to know.
        Ok(None) => return,
        Err(error) => News::Failed(error),
    };
    let _ = news.send(last).await;
}

/// Sends entries; journalctl's exit code, or none if nobody takes them.
async fn entries(
    client: &Client,
    unit: &str,
    query: &JournalQuery,
    form: Form,
    asking: &Semaphore,
    news: &mpsc::Sender<News>,
) -> Result<Option<i32>, Error> {
    let mut journal = {
        let _permit = asking.acquire().await;
        client.journal(unit, query).await?
    };
    let mut reader = Reader::new(form.wire());
    let mut over = false;
    while !over {
        let piece = if query.follow {
            journal.next().await
        } else {
            match timeout(SILENCE, journal.next()).await {
                Ok(piece) => piece,
                Err(_) => Err(journal.silent(SILENCE)),
            }
        };
        let broken = match piece {
            Ok(Some(piece)) => reader.push(&piece).map_err(|reason| journal.malformed(reason)).err(),
            Ok(None) => {
                over = true;
                None
            }
            Err(error) => Some(error),
        };
        if over || broken.is_some() {
            reader.end();
        }
        while let Some(entry) = reader.take() {
            if news.send(News::Entry(entry, Instant::now())).await.is_err() {
                return Ok(None);
            }
        }
        if let Some(error) = broken {
            return Err(error);
        }
    }
    Ok(Some(journal.exit_code().unwrap_or(0)))
}
