//! Commands inside a host: to the end with a deadline, or running alongside.

use std::ffi::{OsStr, OsString};
use std::io::Write as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, kill_process_group, pidfd_open};

use crate::state::poll_until;

/// How long a command may take unless told otherwise.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(60);
/// Bytes of output kept per stream; what goes beyond is read and dropped.
const OUTPUT_LIMIT: usize = 64 << 20;
/// PATH inside hosts: the system's own, not that of whoever calls.
pub(crate) const HOST_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A command to be run inside a host, as root, in /root unless told otherwise.
#[derive(Debug)]
pub struct Command {
    inner: std::process::Command,
    shown: String,
    stdin: Vec<u8>,
    deadline: Duration,
    /// Why it cannot be run.
    impossible: Option<anyhow::Error>,
}

impl Command {
    /// `init` is the number of the host's PID 1 on this machine, or why there is none.
    pub(crate) fn in_host(host: &str, init: Result<i32>, dir: &str, argv: &[OsString]) -> Command {
        let (init, impossible) = match init {
            Ok(init) => (init, None),
            Err(error) => (0, Some(error)),
        };
        let mut inner = std::process::Command::new("nsenter");
        inner.arg("-t").arg(init.to_string()).arg("-a").arg(format!("--wdns={dir}")).arg("--").args(argv);
        inner.env_clear().env("PATH", HOST_PATH).env("HOME", "/root").env("USER", "root");
        inner.env("LANG", "C.UTF-8").env("SHELL", "/bin/bash");
        Command {
            inner,
            shown: format!("{host}: {}", join(argv)),
            stdin: Vec::new(),
            deadline: DEFAULT_DEADLINE,
            impossible,
        }
    }

    /// Sets an environment variable.
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Command {
        self.inner.env(key, value);
        self
    }

    /// What the command reads on its standard input; nothing unless given.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Command {
        self.stdin = bytes.into();
        self
    }

    /// How long [`run`](Command::run) waits before it kills the command; [`DEFAULT_DEADLINE`] unless given.
    pub fn deadline(mut self, deadline: Duration) -> Command {
        self.deadline = deadline;
        self
    }

    /// Runs the command to its end. An exit code other than 0 is no error here, see
    /// [`Output::ok`]; a command that cannot be run or passes its deadline is one.
    pub fn run(self) -> Result<Output> {
        let deadline = self.deadline;
        self.start()?.finish(deadline)
    }

    /// Starts the command and returns at once.
    pub fn start(mut self) -> Result<Running> {
        self.check()?;
        // A group of its own: a kill then reaches all it started, in the host's PID namespace too.
        self.inner.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::piped());
        let mut child =
            self.inner.spawn().with_context(|| format!("cannot run nsenter for `{}`", self.shown))?;
        let mut stdin = child.stdin.take();
        if let Some(pipe) = stdin.take_if(|_| !self.stdin.is_empty()) {
            let bytes = std::mem::take(&mut self.stdin);
            let mut pipe: ChildStdin = pipe;
            // By a thread: a command that writes before it reads must not block both sides. It ends
            // with the command, whose end closes the pipe; an early end is the command's affair.
            std::thread::spawn(move || pipe.write_all(&bytes).ok());
        }
        let stdout = child.stdout.take().context("no stdout")?;
        let stderr = child.stderr.take().context("no stderr")?;
        Ok(Running {
            child,
            shown: self.shown,
            stdin,
            stdout: Stream::new(stdout),
            stderr: Stream::new(stderr),
            started: Instant::now(),
            status: None,
        })
    }

    fn check(&mut self) -> Result<()> {
        self.impossible.take().map_or(Ok(()), Err)
    }

    /// Replaces this process by the command, on this process's terminal.
    pub(crate) fn exec(mut self) -> anyhow::Error {
        if let Err(error) = self.check() {
            return error;
        }
        if let Some(term) = std::env::var_os("TERM") {
            self.inner.env("TERM", term);
        }
        let error = self.inner.exec();
        anyhow::Error::new(error).context("cannot run nsenter")
    }

    /// Runs the command on this process's terminal and returns how it ended.
    pub(crate) fn attach(mut self) -> Result<ExitStatus> {
        self.check()?;
        if let Some(term) = std::env::var_os("TERM") {
            self.inner.env("TERM", term);
        }
        self.inner.status().context("cannot run nsenter")
    }
}

/// What a command that ended left.
#[derive(Clone, Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output; bytes that are no UTF-8 are replaced.
    pub stdout: String,
    /// Its standard error; bytes that are no UTF-8 are replaced.
    pub stderr: String,
    /// How long it took.
    pub took: Duration,
    shown: String,
}

impl Output {
    /// The exit code; 128 plus the signal's number for one that a signal ended, as a shell has it.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Whether the exit code is 0.
    pub fn success(&self) -> bool {
        self.status.success()
    }

    /// The output of a command that must succeed; else an error with all that is known.
    pub fn ok(self) -> Result<Output> {
        if self.success() {
            return Ok(self);
        }
        bail!(
            "`{}` ended with code {}\n--- stdout\n{}--- stderr\n{}",
            self.shown,
            self.code(),
            self.stdout,
            self.stderr
        )
    }
}

/// A command that runs inside a host; killed, with all it started, when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    shown: String,
    stdin: Option<ChildStdin>,
    stdout: Stream<ChildStdout>,
    stderr: Stream<ChildStderr>,
    started: Instant,
    status: Option<ExitStatus>,
}

impl Running {
    /// Writes to its standard input (not available when [`Command::stdin`] was given).
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let pipe = self.stdin.as_mut().with_context(|| format!("`{}`: input is closed", self.shown))?;
        pipe.write_all(bytes).with_context(|| format!("`{}` takes no input", self.shown))
    }

    /// Ends its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// The next line of standard output without its newline; none at the end of the output; an error
    /// when none comes within `deadline`.
    pub fn read_line(&mut self, deadline: Duration) -> Result<Option<String>> {
        let end = Instant::now() + deadline;
        loop {
            if let Some(line) = self.stdout.take_line() {
                return Ok(Some(line));
            }
            if self.stdout.pipe.is_none() {
                let rest = self.stdout.take_rest();
                return Ok((!rest.is_empty()).then_some(rest));
            }
            if !self.pump(end)? {
                bail!(
                    "`{}`: no line within {deadline:?}; stderr so far:\n{}",
                    self.shown,
                    self.stderr.peek()
                );
            }
        }
    }

    /// Reads lines until one holds `text`, and returns that line.
    pub fn wait_for(&mut self, text: &str, deadline: Duration) -> Result<String> {
        let end = Instant::now() + deadline;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.read_line(left).with_context(|| format!("waiting for {text:?}"))? {
                Some(line) if line.contains(text) => return Ok(line),
                Some(_) => {}
                None => bail!("`{}` ended its output without {text:?}", self.shown),
            }
        }
    }

    /// Sends a signal to the command itself.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        // nsenter waits for the command, its only child, and hands on how that ended.
        let nsenter = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{nsenter}/task/{nsenter}/children"));
        let child = children.unwrap_or_default().split_ascii_whitespace().next().and_then(|p| p.parse().ok());
        let pid = child.and_then(Pid::from_raw).unwrap_or(Pid::from_child(&self.child));
        kill_process(pid, signal).with_context(|| format!("cannot signal `{}`", self.shown))
    }

    /// Whether the command still runs.
    pub fn is_running(&mut self) -> Result<bool> {
        if self.status.is_none() {
            self.status = self.child.try_wait().context("cannot wait for a command")?;
        }
        Ok(self.status.is_none())
    }

    /// Ends its input and waits for its end; at the deadline it is killed, which is an error.
    /// The output is what [`read_line`](Running::read_line) has not taken yet.
    pub fn finish(mut self, deadline: Duration) -> Result<Output> {
        self.stdin = None;
        let end = Instant::now() + deadline;
        while self.is_running()? {
            if !self.pump(end)? {
                // Drop kills it.
                bail!(
                    "`{}` has not ended within {deadline:?}\n--- stdout\n{}--- stderr\n{}",
                    self.shown,
                    self.stdout.peek(),
                    self.stderr.peek()
                );
            }
        }
        // It has ended; what it wrote is in the pipes. Something it left behind may hold them open,
        // so this does not wait for their end.
        self.stdout.drain()?;
        self.stderr.drain()?;
        Ok(Output {
            status: self.status.context("no exit status")?,
            stdout: self.stdout.take_rest(),
            stderr: self.stderr.take_rest(),
            took: self.started.elapsed(),
            shown: self.shown.clone(),
        })
    }

    /// Takes in what there is; returns after something happened (true) or at `end` (false).
    fn pump(&mut self, end: Instant) -> Result<bool> {
        let exit = match self.status {
            None => Some(pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty())?),
            Some(_) => None,
        };
        let mut fds = Vec::with_capacity(3);
        fds.extend(self.stdout.pipe.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        fds.extend(self.stderr.pipe.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        fds.extend(exit.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
        if !poll_until(&mut fds, end)? {
            return Ok(false);
        }
        self.stdout.drain()?;
        self.stderr.drain()?;
        self.is_running()?;
        Ok(true)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

/// One output stream: what came and was not taken yet.
#[derive(Debug)]
struct Stream<P> {
    /// None once the other side closed it.
    pipe: Option<P>,
    bytes: Vec<u8>,
}

impl<P: std::io::Read + rustix::fd::AsFd> Stream<P> {
    fn new(pipe: P) -> Stream<P> {
        // A pipe that cannot be made non-blocking does not exist; reading would tell.
        let _ = rustix::io::ioctl_fionbio(&pipe, true);
        Stream { pipe: Some(pipe), bytes: Vec::new() }
    }

    /// Reads what is there now.
    fn drain(&mut self) -> Result<()> {
        let mut buffer = [0; 64 << 10];
        while let Some(pipe) = &mut self.pipe {
            match pipe.by_ref().read(&mut buffer) {
                Ok(0) => self.pipe = None,
                Ok(n) => {
                    let room = OUTPUT_LIMIT.saturating_sub(self.bytes.len());
                    self.bytes.extend_from_slice(&buffer[..n.min(room)]);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("cannot read a command's output"),
            }
        }
        Ok(())
    }

    fn take_line(&mut self) -> Option<String> {
        let newline = self.bytes.iter().position(|&b| b == b'\n')?;
        let line = String::from_utf8_lossy(&self.bytes[..newline]).into_owned();
        self.bytes.drain(..=newline);
        Some(line)
    }

    fn take_rest(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.bytes)).into_owned()
    }

    fn peek(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

/// Runs a program of this machine that must succeed; returns its standard output.
pub(crate) fn outer<S: AsRef<OsStr>>(argv: &[S]) -> Result<String> {
    outer_with(argv, b"")
}

/// [`outer`] with input.
pub(crate) fn outer_with<S: AsRef<OsStr>>(argv: &[S], input: &[u8]) -> Result<String> {
    let shown = join(argv);
    let (program, args) = argv.split_first().context("no command")?;
    let mut child = std::process::Command::new(program)
        .args(args)
        .env("PATH", HOST_PATH)
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run `{shown}`"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that does not want its input says why on stderr.
        let _ = stdin.write_all(input);
    }
    let output = child.wait_with_output().with_context(|| format!("cannot run `{shown}`"))?;
    if !output.status.success() {
        bail!("`{shown}` failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The command line as one would type it, near enough to be read.
fn join<S: AsRef<OsStr>>(argv: &[S]) -> String {
    let mut words = Vec::new();
    for word in argv {
        let word = word.as_ref().to_string_lossy();
        let plain =
            !word.is_empty() && !word.contains(|c: char| c.is_whitespace() || "'\"$\\;&|<>".contains(c));
        words.push(if plain { word.into_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) });
    }
    words.join(" ")
}
