//! `systemctl status` and `journalctl`, run for somebody who is not on this machine.
use crate::Output;
use bytes::{Bytes, BytesMut};
use fleet_unit::UnitName;
use std::{
    os::unix::process::ExitStatusExt,
    process::{ExitStatus, Stdio},
    sync::Arc,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::Command,
    sync::{Semaphore, mpsc},
};

/// The largest piece of output, bytes.
const PIECE: usize = 16 << 10;
/// Pieces that wait for a slow reader before the command has to wait.
const PIECES: usize = 4;
/// Commands that may run at a time; followed journals count as long as they are followed.
const AT_A_TIME: usize = 128;

/// Runs commands, not too many at a time.
#[derive(Clone)]
pub(crate) struct Commands(Arc<Semaphore>);

impl Default for Commands {
    fn default() -> Self {
        Commands(Arc::new(Semaphore::new(AT_A_TIME)))
    }
}

impl Commands {
    /// `systemctl status UNIT`. As the original, with whole lines (golden/11-status-journal.txt).
    pub(crate) fn status(&self, unit: &UnitName) -> mpsc::Receiver<Output> {
        let mut command = Command::new("systemctl");
        command.args(["status", "--no-pager", "--full", "--", unit.as_str()]);
        self.run(command)
    }

    /// `journalctl` of a unit; an unknown `output` is for journalctl to refuse.
    pub(crate) fn journal(
        &self,
        unit: &UnitName,
        lines: u32,
        follow: bool,
        output: &str,
    ) -> mpsc::Receiver<Output> {
        let mut command = Command::new("journalctl");
        command.arg("--no-pager").arg(format!("--unit={unit}")).arg(format!("--lines={lines}"));
        command.arg(format!("--output={output}"));
        if follow {
            command.arg("--follow");
        }
        self.run(command)
    }

    fn run(&self, mut command: Command) -> mpsc::Receiver<Output> {
        command
            .envs([
                ("SYSTEMD_COLORS", "0"),
                ("SYSTEMD_URLIFY", "0"),
                ("SYSTEMD_PAGER", ""),
                ("NO_COLOR", "1"),
            ])
            // Else systemctl writes `*` for `●`.
            .envs([("LANG", "C.UTF-8"), ("LC_ALL", "C.UTF-8")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let (sender, output) = mpsc::channel(PIECES);
        let permits = self.0.clone();
        tokio::spawn(async move {
            let exit = match permits.try_acquire() {
                Ok(_permit) => pump(command, &sender).await,
                Err(_) => {
                    say(&sender, "Too many journals are being read on this machine; try again later.\n")
                        .await;
                    Some(1)
                }
            };
            if let Some(exit) = exit {
                // The reader may be gone by now.
                let _ = sender.send(Output::Exit(exit)).await;
            }
        });
        output
    }
}

async fn say(sender: &mpsc::Sender<Output>, text: &str) {
    // A reader who is gone misses nothing.
    let _ = sender.send(Output::Err(Bytes::copy_from_slice(text.as_bytes()))).await;
}

/// Runs the command to its end and gives its exit code, or kills it when nobody reads any more.
async fn pump(mut command: Command, sender: &mpsc::Sender<Output>) -> Option<i32> {
    let program = command.as_std().get_program().to_string_lossy().into_owned();
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            say(sender, &format!("Can't run {program} on this machine: {error}.\n")).await;
            return Some(127);
        }
    };
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let finished = async {
        tokio::join!(pieces(out, sender, Output::Out), pieces(err, sender, Output::Err));
        child.wait().await
    };
    let status = tokio::select! {
        status = finished => Some(status),
        () = sender.closed() => None,
    };
    match status {
        Some(Ok(status)) => Some(code(status)),
        Some(Err(error)) => {
            say(sender, &format!("Lost track of {program}: {error}.\n")).await;
            Some(1)
        }
        None => {
            // Fails only if it has ended already.
            let _ = child.kill().await;
            None
        }
    }
}

async fn pieces(
    stream: Option<impl AsyncRead + Unpin>,
    sender: &mpsc::Sender<Output>,
    piece: fn(Bytes) -> Output,
) {
    let Some(mut stream) = stream else { return };
    let mut buffer = BytesMut::new();
    loop {
        // Room first: a slow reader makes the command wait, not this process grow.
        let Ok(room) = sender.reserve().await else { return };
        buffer.reserve(PIECE);
        match (&mut stream).take(PIECE as u64).read_buf(&mut buffer).await {
            Ok(1..) => room.send(piece(buffer.split().freeze())),
            // A pipe that can't be read is at its end.
            Ok(0) | Err(_) => return,
        }
    }
}

/// As a shell gives it: a signal is 128 and its number.
fn code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    async fn collect(mut output: mpsc::Receiver<Output>) -> (String, String, Option<i32>) {
        let (mut out, mut err, mut exit) = (Vec::new(), Vec::new(), None);
        while let Some(piece) = output.recv().await {
            assert_eq!(exit, None, "the exit code comes last");
            match piece {
                Output::Out(bytes) => out.extend_from_slice(&bytes),
                Output::Err(bytes) => err.extend_from_slice(&bytes),
                Output::Exit(code) => exit = Some(code),
            }
        }
        (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap(), exit)
    }

    #[tokio::test]
    async fn output_and_exit_code() {
        let script = "echo $SYSTEMD_COLORS$LANG; echo no >&2; exit 3";
        let result = collect(Commands::default().run(shell(script))).await;
        assert_eq!(result, ("0C.UTF-8\n".into(), "no\n".into(), Some(3)));
        assert_eq!(collect(Commands::default().run(shell("kill -9 $$"))).await.2, Some(137));
        let missing = Command::new("/no/such/program");
        let (_, err, exit) = collect(Commands::default().run(missing)).await;
        assert!(err.starts_with("Can't run /no/such/program"), "{err}");
        assert_eq!(exit, Some(127));
    }

    #[tokio::test]
    async fn large_output_passes_in_pieces() {
        let output = Commands::default().run(shell("head -c 300000 /dev/zero | tr '\\0' x"));
        let (out, _, exit) = collect(output).await;
        assert_eq!((out.len(), exit), (300_000, Some(0)));
    }

    #[tokio::test]
    async fn a_reader_who_leaves_ends_the_command() {
        let commands = Commands::default();
        let mut output = commands.run(shell("echo $$; exec sleep 1000"));
        let Some(Output::Out(line)) = output.recv().await else { panic!("no output") };
        let process = format!("/proc/{}", std::str::from_utf8(&line).unwrap().trim());
        assert!(std::path::Path::new(&process).exists());
        drop(output);
        // The permit comes back when the command is dead and collected.
        let all = commands.0.acquire_many(AT_A_TIME as u32).await.unwrap();
        assert!(!std::path::Path::new(&process).exists());
        drop(all);
    }

    #[tokio::test]
    async fn not_too_many() {
        let commands = Commands::default();
        let _all = commands.0.acquire_many(AT_A_TIME as u32).await.unwrap();
        let (_, err, exit) = collect(commands.run(shell("true"))).await;
        assert!(err.starts_with("Too many"), "{err}");
        assert_eq!(exit, Some(1));
    }
}
