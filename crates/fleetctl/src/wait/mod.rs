//! Waiting until units are where they should be: by the server's events, with a look at the clock
//! and at Ctrl-C. What the events mean is decided in [`tracker`].
pub(crate) mod progress;
pub(crate) mod tracker;

use crate::cli::Patience;
use crate::context::{Context, is_global};
use anyhow::Result;
use fleet_api::client::{Client, Error, EventQuery, EventStream, StateFilter, file_of_options};
use fleet_api::events::{Event, UnitEvent};
use fleet_api::types::{Explanation, Reason};
use futures_util::{StreamExt, stream};
use progress::Progress;
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep_until;
use tracker::{Goal, Source, Tracker, Verdict, Waiting};

/// How long a unit may be without a machine, unless --timeout says otherwise.
const UNPLACED: Duration = Duration::from_secs(30);

/// One attempt of `--block-attempts`: so long the original polled before it counted one.
const ATTEMPT: Duration = Duration::from_secs(2);

/// How often a server without events is asked.
const POLL: Duration = Duration::from_millis(500);

/// After what time it is worth telling what is waited for.
const QUIET: Duration = Duration::from_millis(700);

/// How often what is waited for is told anew.
const BETWEEN_LOOKS: Duration = Duration::from_millis(150);

/// How long a lost server is tried to be reached again.
const LOST: Duration = Duration::from_secs(30);

/// The longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// The most names that a subscription lists; for more, all events are taken.
const MOST_NAMES: usize = 500;

/// How many units of an old server are asked for at the same time.
const AT_ONCE: usize = 16;

/// When to give up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// After this time, whatever it is.
    pub(crate) all: Option<Duration>,
    /// When no machine has been found for so long.
    pub(crate) unplaced: Option<Duration>,
}

impl Limits {
    /// By the flags: attempts have 2 s each, as the original's; otherwise `--timeout`.
    pub(crate) fn of(patience: Patience) -> Self {
        let attempts = u32::try_from(patience.block_attempts).ok().filter(|&n| n > 0);
        let attempts = attempts.map(|n| ATTEMPT.saturating_mul(n));
        match (attempts, patience.timeout) {
            (Some(all), _) => Limits { all: Some(all), unplaced: None },
            (None, Some(Duration::ZERO)) => Limits { all: None, unplaced: None },
            (None, Some(all)) => Limits { all: Some(all), unplaced: None },
            (None, None) => Limits { all: None, unplaced: Some(UNPLACED) },
        }
    }
}

/// How the waiting ended.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Units that will not get there, in the order in which that came out.
    pub(crate) failed: Vec<(String, Verdict)>,
    /// Units that were given up, and what they waited for.
    pub(crate) late: Vec<(String, Waiting)>,
    /// The server could not be reached any more.
    pub(crate) lost: Option<Error>,
    /// The user pressed Ctrl-C.
    pub(crate) interrupted: bool,
}

impl Outcome {
    /// Whether all units are where they should be.
    pub(crate) fn is_good(&self) -> bool {
        self.failed.is_empty() && self.late.is_empty() && self.lost.is_none() && !self.interrupted
    }
}

/// Waits for units; says of each that arrives on stdout how far it has come, if `say`.
pub(crate) async fn wait(
    context: &Context,
    goal: Goal,
    units: Vec<(String, bool)>,
    limits: Limits,
    say: bool,
) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    if units.is_empty() {
        return Ok(outcome);
    }
    let start = Instant::now();
    let names = units.iter().map(|(name, _)| name.clone()).collect();
    let mut tracker = Tracker::new(goal, units, limits.unplaced);
    let mut feed = Feed::new(context, names);
    let mut progress = Progress::new();
    let hard = limits.all.map(|limit| start + limit);
    // What is waited for is told when it has lasted a while, and then not too often.
    let mut next_look = start + QUIET;
    let mut changed = true;
    let mut interrupts = signal(SignalKind::interrupt())?;
    while !tracker.is_done() {
        let due = [hard, tracker.deadline(), changed.then_some(next_look)].into_iter().flatten().min();
        let alarm = async {
            match due {
                Some(due) => sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            _ = interrupts.recv() => {
                outcome.interrupted = true;
                return Ok(outcome);
            }
            () = alarm => {
                let now = Instant::now();
                outcome.late.extend(tracker.give_up(now, hard.is_some_and(|hard| now >= hard)));
            }
            news = feed.next() => match news {
                News::Begin(source) => tracker.begin(source),
                News::Trouble(error) => {
                    progress.show(&format!("Lost contact with fleetd, trying again: {}", error.reason()), true);
                    continue;
                }
                News::Lost(error) => {
                    outcome.lost = Some(error);
                    return Ok(outcome);
                }
                News::Event(event) => {
                    changed = true;
                    for (name, verdict) in tracker.take(Instant::now(), &event) {
                        match verdict {
                            Verdict::Reached { state, machine_id } if say => {
                                progress.clear();
                                context.say_unit(&name, &state, &machine_id).await?;
                            }
                            Verdict::Reached { .. } => {}
                            failed => outcome.failed.push((name, failed)),
                        }
                    }
                }
            },
        }
        if changed && Instant::now() >= next_look {
            changed = false;
            next_look = Instant::now() + BETWEEN_LOOKS;
            if let Some((line, lasting)) = describe(context, &tracker).await {
                progress.show(&line, lasting);
            }
        } else if say {
            // The names of the machines, which the first line will need, can be had meanwhile.
            context.machines().await;
        }
    }
    Ok(outcome)
}

/// What is known of units at this moment, without waiting for anything to come about; `None` when
/// the server is one without events.
pub(crate) async fn observe(context: &Context, names: Vec<String>) -> Result<Option<Vec<UnitEvent>>, Error> {
    let query = EventQuery { units: names, snapshot: true, ..EventQuery::default() };
    let mut events = match context.client.events(&query).await {
        Err(error) if error.is_unknown_resource() => return Ok(None),
        events => events?,
    };
    let mut units = Vec::new();
    while let Some((_, event)) = events.next().await? {
        match event {
            Event::Unit(unit) => units.push(unit),
            Event::Ready => break,
            _ => {}
        }
    }
    Ok(Some(units))
}

/// One line on what is waited for, and whether it will not come by itself.
async fn describe(context: &Context, tracker: &Tracker) -> Option<(String, bool)> {
    let mut waiting: Vec<(&str, Waiting)> = tracker.waiting().collect();
    // The one without a machine is of most interest.
    let needs_machine = |what: &Waiting| matches!(what, Waiting::Unplaced(_) | Waiting::Delayed(_));
    waiting.sort_by_key(|(_, what)| (!what.is_lasting(), !needs_machine(what)));
    let (name, what) = waiting.first()?;
    let lasting = what.is_lasting();
    let what = explain(context, what).await;
    let line = match waiting.len() {
        1 => format!("Waiting for {name}: {what}"),
        n => format!("Waiting for {n} of {} units; {name}: {what}", tracker.len()),
    };
    Some((line, lasting))
}

/// What a unit waits for, in words.
pub(crate) async fn explain(context: &Context, waiting: &Waiting) -> String {
    match waiting {
        Waiting::Unheard => "fleetd has not told of it yet".to_owned(),
        Waiting::Unplaced(reasons) => match reasons_in_words(context, reasons).await {
            words if words.is_empty() => "it is on no machine yet".to_owned(),
            words => format!("no machine can take it: {words}"),
        },
        Waiting::Delayed(why) => why.clone(),
        Waiting::OnMachine { machine_id, state, problems } => {
            let place = context.legend(machine_id).await;
            let mut text = match state {
                Some(state) => {
                    format!("it is {} ({}) on {place}", state.systemd_active_state, state.systemd_sub_state)
                }
                None if machine_id.is_empty() => "its machine is at work".to_owned(),
                None => format!("it is on its way on {place}"),
            };
            if let Some(problem) = problems.first() {
                text.push_str(&format!("; {}", problem.reason));
            }
            text
        }
    }
}

/// The most reasons that one line tells.
const MOST_REASONS: usize = 3;

/// Reasons by machine, in one line of bounded length; machines with the same reason together.
pub(crate) async fn reasons_in_words(context: &Context, reasons: &[Reason]) -> String {
    let mut by_reason: Vec<(&str, Vec<&str>)> = Vec::new();
    let mut known: HashMap<&str, usize> = HashMap::new();
    for reason in reasons {
        let at = *known.entry(&reason.reason).or_insert_with(|| {
            by_reason.push((&reason.reason, Vec::new()));
            by_reason.len() - 1
        });
        by_reason[at].1.extend(Some(reason.machine_id.as_str()).filter(|id| !id.is_empty()));
    }
    // The reasons that most machines have.
    by_reason.sort_by_key(|(_, machines)| std::cmp::Reverse(machines.len()));
    let more: usize = by_reason.iter().skip(MOST_REASONS).map(|(_, machines)| machines.len()).sum();
    let mut parts = Vec::new();
    for (text, machines) in by_reason.into_iter().take(MOST_REASONS) {
        parts.push(match machines.as_slice() {
            [] => text.to_owned(),
            [one] => format!("{text} ({})", context.legend(one).await),
            [first, rest @ ..] => {
                format!("{text} ({} and {} more)", context.legend(first).await, rest.len())
            }
        });
    }
    if more > 0 {
        parts.push(format!("{more} more machines for other reasons"));
    }
    parts.join("; ")
}

/// What comes from the server.
pub(crate) enum News {
    /// A snapshot begins.
    Begin(Source),
    Event(Box<Event>),
    /// It cannot be reached, and is tried again.
    Trouble(Error),
    /// It could not be reached for too long.
    Lost(Error),
}

/// Where the feed is.
enum State {
    /// To subscribe, not before this time.
    Subscribe(Instant),
    Streaming(Box<EventStream>),
    /// The original's server: to ask, not before this time.
    Poll(Instant),
}

/// Events of units from any server, through interruptions.
pub(crate) struct Feed<'a> {
    context: &'a Context,
    names: Vec<String>,
    /// Machines, too.
    machines: bool,
    state: State,
    queue: VecDeque<News>,
    /// Since when it cannot be reached, and the pause before the next try.
    trouble: Option<(Instant, Duration)>,
}

impl<'a> Feed<'a> {
    pub(crate) fn new(context: &'a Context, names: Vec<String>) -> Self {
        let state = State::Subscribe(Instant::now());
        Feed { context, names, machines: false, state, queue: VecDeque::new(), trouble: None }
    }

    /// Events of machines come, too.
    pub(crate) fn with_machines(self) -> Self {
        Feed { machines: true, ..self }
    }

    /// The next news. Can be cancelled at any time: what was under way is done again, and every
    /// subscription begins with a snapshot.
    pub(crate) async fn next(&mut self) -> News {
        loop {
            if let Some(news) = self.queue.pop_front() {
                return news;
            }
            match &mut self.state {
                State::Subscribe(at) => {
                    sleep_until((*at).into()).await;
                    let named = self.names.len() <= MOST_NAMES;
                    let units = if named { self.names.clone() } else { Vec::new() };
                    let query = EventQuery { units, machines: self.machines, snapshot: true, since: None };
                    match self.context.client.events(&query).await {
                        Ok(events) => {
                            self.state = State::Streaming(Box::new(events));
                            return News::Begin(Source::Events);
                        }
                        Err(error) if error.is_unknown_resource() => self.state = State::Poll(Instant::now()),
                        Err(error) => return self.trouble(error),
                    }
                }
                State::Streaming(events) => match events.next().await {
                    Ok(Some((_, Event::Reset))) | Ok(None) => {
                        self.state = State::Subscribe(Instant::now() + self.pause());
                    }
                    Ok(Some((_, event))) => {
                        self.trouble = None;
                        return News::Event(Box::new(event));
                    }
                    Err(error) => return self.trouble(error),
                },
                State::Poll(at) => {
                    sleep_until((*at).into()).await;
                    match self.poll().await {
                        Ok(events) => {
                            self.trouble = None;
                            self.state = State::Poll(Instant::now() + POLL);
                            self.queue.push_back(News::Begin(Source::Polling));
                            self.queue.extend(events.into_iter().map(|event| News::Event(Box::new(event))));
                            self.queue.push_back(News::Event(Box::new(Event::Ready)));
                        }
                        Err(error) => {
                            let news = self.trouble(error);
                            if let State::Subscribe(at) = self.state {
                                self.state = State::Poll(at);
                            }
                            return news;
                        }
                    }
                }
            }
        }
    }

    /// The pause before the next try; longer each time until something comes.
    fn pause(&mut self) -> Duration {
        let (since, last) = self.trouble.unwrap_or((Instant::now(), POLL / 8));
        let pause = (last * 2).min(LONGEST_PAUSE);
        self.trouble = Some((since, pause));
        pause
    }

    fn trouble(&mut self, error: Error) -> News {
        let pause = self.pause();
        self.state = State::Subscribe(Instant::now() + pause);
        match self.trouble {
            Some((since, _)) if since.elapsed() > LOST => News::Lost(error),
            // Only a server that refuses says the same again when asked again.
            _ if matches!(error.code(), Some(400..=499)) => News::Lost(error),
            _ => News::Trouble(error),
        }
    }

    /// What the original's API tells of the units, in the form of events.
    async fn poll(&self) -> Result<Vec<Event>, Error> {
        let client = &self.context.client;
        let answers: Vec<Result<Option<Event>, Error>> =
            stream::iter(&self.names).map(|name| as_event(client, name)).buffered(AT_ONCE).collect().await;
        answers.into_iter().filter_map(Result::transpose).collect()
    }
}

/// What the original's API tells of one unit; `None` when there is nothing of it.
async fn as_event(client: &Client, name: &str) -> Result<Option<Event>, Error> {
    let unit = client.unit(name).await?;
    let filter = StateFilter { unit: Some(name.to_owned()), machine: None };
    let states = client.states(&filter).await?;
    if unit.is_none() && states.is_empty() {
        return Ok(None);
    }
    let known = unit.is_some();
    let unit = unit.unwrap_or_default();
    let file = file_of_options(&unit.options).ok().filter(|_| known);
    Ok(Some(Event::Unit(UnitEvent {
        known,
        hash: file.map(|file| file.hash().to_string()).unwrap_or_default(),
        global: is_global(&unit),
        explanation: Explanation {
            current_state: unit.current_state,
            desired_state: unit.desired_state,
            machine_id: unit.machine_id,
            name: name.to_owned(),
            ..Explanation::default()
        },
        states,
    })))
}
