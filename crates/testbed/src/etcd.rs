//! A real etcd of one or more members for a test, on this machine's loopback.
//!
//! Each member has an address of its own in 127.0.0.0/8, so that clusters of tests that run at once don't meet. All goes
//! when the [`Etcd`] is dropped, also by a panic, and the processes go when the test's process is killed.

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use serde_json::Value;
use std::collections::VecDeque;
use std::fmt::Write as _;
use std::hash::{BuildHasher, RandomState};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{LazyLock, mpsc};
use std::time::Duration;

/// How long a member may take to serve, or to end. It takes about a second.
const PATIENCE: Duration = Duration::from_secs(60);
/// What a member's log says when it serves clients; etcd serves none before it has found the others.
const SERVING: &str = "serving client traffic";
/// How many lines of a member's log are kept for messages.
const LOG_LINES: usize = 20;

/// How a cluster is to be.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// How many members.
    pub members: usize,
    /// Certificates; without them it speaks plain HTTP to clients.
    pub tls: Option<EtcdTls>,
    /// More arguments for each `etcd`.
    pub arguments: Vec<String>,
}

/// PEM files for a cluster that speaks TLS to clients.
#[derive(Clone, Debug)]
pub struct EtcdTls {
    /// For the IP address of each member.
    pub certificate: PathBuf,
    /// The certificate's key.
    pub key: PathBuf,
    /// Clients need a certificate of this authority.
    pub client_ca: Option<PathBuf>,
}

/// A running etcd.
pub struct Etcd {
    options: EtcdOptions,
    addresses: Vec<Ipv4Addr>,
    members: Vec<Option<Member>>,
    /// Counts how often the data was wiped: each time it is another cluster.
    age: usize,
    directory: PathBuf,
}

struct Member {
    child: Child,
    log: mpsc::Receiver<String>,
}

impl Etcd {
    /// Starts a cluster of so many members and waits until all of them serve.
    pub fn start(members: usize) -> Result<Self> {
        Self::start_with(
            EtcdOptions { members, tls: None, arguments: Vec::new() },
            &Self::addresses(members)?,
        )
    }

    /// Addresses for so many members, for [`Etcd::start_with`].
    pub fn addresses(members: usize) -> Result<Vec<Ipv4Addr>> {
        let mut addresses = Vec::new();
        while addresses.len() < members {
            let random = RandomState::new().hash_one(addresses.len()).to_be_bytes();
            let address = Ipv4Addr::new(127, random[0].clamp(2, 250), random[1], random[2].clamp(2, 250));
            let free = |port| TcpListener::bind((address, port)).is_ok();
            if !addresses.contains(&address) && free(2379) && free(2380) {
                addresses.push(address);
            }
        }
        Ok(addresses)
    }

    /// Starts a cluster with a member at each of the addresses, and waits until all of them serve.
    pub fn start_with(options: EtcdOptions, addresses: &[Ipv4Addr]) -> Result<Self> {
        ensure!(options.members == addresses.len() && !addresses.is_empty(), "an address for each member");
        let name = format!("fleet-etcd-{}-{:016x}", std::process::id(), RandomState::new().hash_one(0));
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir(&directory).with_context(|| format!("make {}", directory.display()))?;
        let members = addresses.iter().map(|_| None).collect();
        let mut etcd = Etcd { options, addresses: addresses.to_vec(), members, age: 0, directory };
        etcd.boot_all()?;
        Ok(etcd)
    }

    /// The URLs for clients, of all members.
    pub fn endpoints(&self) -> Vec<String> {
        (0..self.addresses.len()).map(|index| self.endpoint(index)).collect()
    }

    /// The URL for clients of one member.
    pub fn endpoint(&self, index: usize) -> String {
        let scheme = if self.options.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}:2379", self.addresses[index])
    }

    /// Ends a member at once, as by a crash.
    pub fn kill(&mut self, index: usize) -> Result<()> {
        let member = self.members[index].take();
        member.map_or(Ok(()), |mut member| member.end())
    }

    /// Ends all members at once.
    pub fn kill_all(&mut self) -> Result<()> {
        (0..self.members.len()).try_for_each(|index| self.kill(index))
    }

    /// Asks a member to end, and waits for it.
    pub fn stop(&mut self, index: usize) -> Result<()> {
        if let Some(mut member) = self.members[index].take() {
            member.signal(Signal::TERM)?;
            member.child.wait()?;
        }
        Ok(())
    }

    /// Stops a member in its tracks: its connections stay open, and silent.
    pub fn pause(&self, index: usize) -> Result<()> {
        let member = self.member(index)?;
        member.signal(Signal::STOP)?;
        // Its threads stop one after the other.
        waitid(WaitId::Pid(member.pid()?), WaitIdOptions::STOPPED)?;
        Ok(())
    }

    /// Lets a paused member go on.
    pub fn resume(&self, index: usize) -> Result<()> {
        self.member(index)?.signal(Signal::CONT)
    }

    /// Starts a member that was ended, with its data, and waits until it serves. A member without a quorum never does.
    pub fn boot(&mut self, index: usize) -> Result<()> {
        self.launch(index)?;
        self.wait(index)
    }

    /// Starts all members that were ended, and waits until all serve.
    pub fn boot_all(&mut self) -> Result<()> {
        let down: Vec<_> = (0..self.members.len()).filter(|index| self.members[*index].is_none()).collect();
        down.iter().try_for_each(|index| self.launch(*index))?;
        down.iter().try_for_each(|index| self.wait(*index))
    }

    /// Ends all members and removes their data. What starts next is a new, empty cluster at the same addresses; with
    /// `new_id` false its cluster ID is the same, too.
    pub fn wipe(&mut self, new_id: bool) -> Result<()> {
        self.kill_all()?;
        for index in 0..self.members.len() {
            std::fs::remove_dir_all(self.data(index))?;
        }
        self.age += usize::from(new_id);
        Ok(())
    }

    /// Copies the data of all members, which have to be ended, to a directory; or back from there.
    pub fn copy_data(&self, other: &Path, back: bool) -> Result<()> {
        ensure!(self.members.iter().all(Option::is_none), "a member runs");
        for index in 0..self.members.len() {
            let (data, copy) = (self.data(index), other.join(format!("member{index}")));
            let (from, to) = if back { (copy, data) } else { (data, copy) };
            if to.exists() {
                std::fs::remove_dir_all(&to)?;
            }
            let status = Command::new("cp").arg("-a").args([&from, &to]).status()?;
            ensure!(status.success(), "cp -a {} {}: {status}", from.display(), to.display());
        }
        Ok(())
    }

    /// Calls etcd's API v3 as JSON, for what a client in Rust is not at hand: keys and values are base64. Not over TLS.
    pub fn api(&self, index: usize, path: &str, body: &Value, token: Option<&str>) -> Result<Value> {
        ensure!(self.options.tls.is_none(), "only without TLS");
        etcd_call(self.addresses[index], path, body, token, PATIENCE)
    }

    /// What a member counts: its metrics as text.
    pub fn metrics(&self, index: usize) -> Result<String> {
        ensure!(self.options.tls.is_none(), "only without TLS");
        http(self.addresses[index], "GET /metrics HTTP/1.0\r\n\r\n", PATIENCE)
    }

    fn data(&self, index: usize) -> PathBuf {
        self.directory.join(format!("member{index}"))
    }

    fn member(&self, index: usize) -> Result<&Member> {
        self.members[index].as_ref().ok_or_else(|| anyhow!("etcd's member {index} does not run"))
    }

    fn launch(&mut self, index: usize) -> Result<()> {
        let address = self.addresses[index];
        let cluster: Vec<_> =
            self.addresses.iter().enumerate().map(|(n, a)| format!("m{n}=http://{a}:2380")).collect();
        // The end of this process, and of nothing else, takes it along.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "etcd", "--logger=zap", "--log-outputs=stderr"]);
        command.arg(format!("--name=m{index}"));
        command.arg(format!("--data-dir={}", self.data(index).display()));
        command.arg(format!("--listen-peer-urls=http://{address}:2380"));
        command.arg(format!("--initial-advertise-peer-urls=http://{address}:2380"));
        command.arg(format!("--listen-client-urls={}", self.endpoint(index)));
        command.arg(format!("--advertise-client-urls={}", self.endpoint(index)));
        command.arg(format!("--initial-cluster={}", cluster.join(",")));
        command.arg(format!("--initial-cluster-token=fleet-{}", self.age));
        command.args(["--heartbeat-interval=50", "--election-timeout=500"]);
        if let Some(tls) = &self.options.tls {
            command.arg(format!("--cert-file={}", tls.certificate.display()));
            command.arg(format!("--key-file={}", tls.key.display()));
            if let Some(ca) = &tls.client_ca {
                command.arg("--client-cert-auth");
                command.arg(format!("--trusted-ca-file={}", ca.display()));
            }
        }
        command.args(&self.options.arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = spawn(command).context("start etcd")?;
        let stderr = child.stderr.take().context("etcd's log")?;
        let (lines, log) = mpsc::channel();
        std::thread::spawn(move || read_log(stderr, &lines));
        self.members[index] = Some(Member { child, log });
        Ok(())
    }

    fn wait(&mut self, index: usize) -> Result<()> {
        let member = self.members[index].as_mut().context("the member was started")?;
        let mut last = VecDeque::new();
        loop {
            let problem = match member.log.recv_timeout(PATIENCE) {
                Ok(line) if line.contains(SERVING) => return Ok(()),
                Ok(line) => {
                    last.truncate(LOG_LINES - 1);
                    last.push_front(line);
                    continue;
                }
                Err(mpsc::RecvTimeoutError::Timeout) => format!("does not serve after {PATIENCE:?}"),
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    format!("ended: {} (is the Debian package etcd-server installed?)", member.child.wait()?)
                }
            };
            let mut text = String::new();
            last.iter().rev().try_for_each(|line| write!(text, "\n{line}"))?;
            bail!("etcd's member {index} {problem}{text}");
        }
    }
}

/// Calls the API v3 of the etcd at an address, port 2379, as JSON: keys and values are base64.
pub fn etcd_call(
    address: Ipv4Addr,
    path: &str,
    body: &Value,
    token: Option<&str>,
    deadline: Duration,
) -> Result<Value> {
    let authorization = token.map(|token| format!("Authorization: {token}\r\n")).unwrap_or_default();
    let body = body.to_string();
    let head = format!("POST /v3/{path} HTTP/1.0\r\n{authorization}Content-Length: {}\r\n\r\n", body.len());
    let text = http(address, &(head + &body), deadline)?;
    serde_json::from_str(&text).with_context(|| format!("etcd answered {path} with {text}"))
}

/// The same for a call that is answered by a stream, such as a watch: `each` is given every answer, and says whether it wants more. No answer
/// may take longer than the deadline.
pub fn etcd_follow(
    address: Ipv4Addr,
    path: &str,
    body: &Value,
    deadline: Duration,
    mut each: impl FnMut(&Value) -> Result<bool>,
) -> Result<()> {
    let body = body.to_string();
    let request = format!("POST /v3/{path} HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let mut answers = send(address, &request, deadline)?.lines();
    let status = answers.next().context("an answer of HTTP")??;
    ensure!(status.split(' ').nth(1) == Some("200"), "etcd answers {path} with {status}");
    for line in answers.skip_while(|line| line.as_ref().is_ok_and(|line| !line.is_empty())).skip(1) {
        let line = line?;
        let answer =
            serde_json::from_str(&line).with_context(|| format!("etcd answered {path} with {line}"))?;
        if !each(&answer)? {
            return Ok(());
        }
    }
    bail!("etcd ended its answer to {path}")
}

fn send(address: Ipv4Addr, request: &str, deadline: Duration) -> Result<BufReader<TcpStream>> {
    let mut stream = TcpStream::connect_timeout(&(address, 2379).into(), deadline)?;
    stream.set_read_timeout(Some(deadline))?;
    stream.write_all(request.as_bytes())?;
    Ok(BufReader::new(stream))
}

fn http(address: Ipv4Addr, request: &str, deadline: Duration) -> Result<String> {
    let mut answer = String::new();
    send(address, request, deadline)?.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer of HTTP")?;
    ensure!(head.split(' ').nth(1) == Some("200"), "etcd answers {answer}");
    Ok(body.to_owned())
}

impl std::fmt::Debug for Etcd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Etcd").field(&self.addresses).finish()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        if let Err(error) = self.kill_all() {
            eprintln!("ending etcd: {error:#}");
        }
        if let Err(error) = std::fs::remove_dir_all(&self.directory) {
            eprintln!("removing {}: {error}", self.directory.display());
        }
    }
}

impl Member {
    fn pid(&self) -> Result<Pid> {
        i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("a process ID")
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(self.pid()?, signal)?)
    }

    fn end(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

/// Passes on the lines of a member's log until it serves, and reads on, so that it never waits for us.
fn read_log(stderr: ChildStderr, lines: &mpsc::Sender<String>) {
    let mut wanted = true;
    for line in BufReader::new(stderr).lines().map_while(Result::ok) {
        if wanted {
            wanted = !line.contains(SERVING) && lines.send(line.clone()).is_ok();
            if !wanted {
                // Nobody listens any more when this fails.
                let _ = lines.send(line);
            }
        }
    }
}

/// Starts a process from a thread that lives as long as this process: `--pdeathsig` goes by the thread.
fn spawn(command: Command) -> Result<Child> {
    type Job = (Command, mpsc::Sender<std::io::Result<Child>>);
    static SPAWNER: LazyLock<std::sync::Mutex<mpsc::Sender<Job>>> = LazyLock::new(|| {
        let (jobs, queue) = mpsc::channel::<Job>();
        std::thread::spawn(move || {
            for (mut command, answer) in queue {
                // Nobody waits any more when this fails.
                let _ = answer.send(command.spawn());
            }
        });
        std::sync::Mutex::new(jobs)
    });
    let (answer, child) = mpsc::channel();
    let jobs = SPAWNER.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
    jobs.send((command, answer)).map_err(|_| anyhow!("the thread that starts processes has ended"))?;
    child.recv()?.context("run setpriv (Debian package util-linux)")
}
