//! fd-forward: stdin and stdout connected with a unix socket; the other end of `--tunnel`
//! (golden/12-ssh.txt, "fd-forward").
use crate::context::words;
use anyhow::Result;
use tokio::io::AsyncWriteExt;

pub(crate) async fn run(arguments: &[String]) -> Result<i32> {
    let [path] = arguments else {
        eprintln!("Provide a single argument");
        return Ok(1);
    };
    let stream = match tokio::net::UnixStream::connect(path).await {
        Ok(stream) => stream,
        Err(error) => {
            eprintln!("Failed dialing remote address: dial unix {path}: connect: {}", words(&error));
            return Ok(1);
        }
    };
    let (mut from_socket, mut to_socket) = stream.into_split();
    let (mut stdin, mut stdout) = (tokio::io::stdin(), tokio::io::stdout());
    // Whichever side ends first ends it all, as in the original: the client at the other end keeps
    // its side open for as long as it wants answers.
    let copied = tokio::select! {
        copied = tokio::io::copy(&mut from_socket, &mut stdout) => copied,
        copied = tokio::io::copy(&mut stdin, &mut to_socket) => copied,
    };
    stdout.flush().await?;
    if let Err(error) = copied {
        eprintln!("Encountered error during copy: {}", words(&error));
        return Ok(1);
    }
    Ok(0)
}
