//! The way to a running charon: commands and their answers, and what it tells by itself.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::message::{Answer, PACKET_MAX, Request, Section, register};

/// Where charon listens, unless its own configuration says otherwise; upstream knows this place only.
pub(super) const SOCKET: &str = "/var/run/charon.vici";

/// Longest wait for an answer. Nothing that is asked here waits for a peer.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// Why charon did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum ViciError {
    /// It cannot be talked to.
    #[error("charon's socket {SOCKET} fails")]
    Io(#[from] io::Error),
    /// It does not answer.
    #[error("charon did not answer {command} within {} s", ANSWER_MAX.as_secs())]
    Silent {
        /// What was asked.
        command: &'static str,
    },
    /// It answers something else.
    #[error("charon answered {command} with something that is not VICI")]
    Garbled {
        /// What was asked.
        command: &'static str,
    },
    /// It says no.
    #[error("charon refused {command}: {said}")]
    Refused {
        /// What was asked.
        command: &'static str,
        /// Its words.
        said: String,
    },
}

impl ViciError {
    /// Whether it is worth asking charon anything else now.
    pub(super) fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}

/// A connection that commands go over, one after another.
pub(super) struct Client(UnixStream);

impl Client {
    pub(super) async fn connect() -> io::Result<Self> {
        UnixStream::connect(Path::new(SOCKET)).await.map(Self)
    }

    /// Asks for a command and takes its answer. One that says that it failed is an error.
    pub(super) async fn ask(
        &mut self,
        command: &'static str,
        request: &Request,
    ) -> Result<Section, ViciError> {
        self.stream(command, request, |_| {}).await
    }

    /// Asks for events of a kind from now on.
    pub(super) async fn register(&mut self, event: &'static str) -> Result<(), ViciError> {
        self.0.write_all(&register(event)).await?;
        loop {
            match self.answer(event).await? {
                Answer::Confirmed => return Ok(()),
                Answer::UnknownEvent => {
                    let said = "there are no such events".into();
                    return Err(ViciError::Refused { command: event, said });
                }
                // Of another kind, which is registered already.
                Answer::Event(..) => {}
                _ => return Err(ViciError::Garbled { command: event }),
            }
        }
    }

    /// Asks for a command whose answer comes in events.
    pub(super) async fn stream(
        &mut self,
        command: &'static str,
        request: &Request,
        mut take: impl FnMut(Section),
    ) -> Result<Section, ViciError> {
        self.0.write_all(&request.command(command)).await?;
        loop {
            match self.answer(command).await? {
                Answer::Event(_, section) => take(section),
                Answer::Response(section) if section.text("success") == "no" => {
                    let said = section.text("errmsg").to_owned();
                    return Err(ViciError::Refused { command, said });
                }
                Answer::Response(section) => return Ok(section),
                Answer::UnknownCommand => {
                    return Err(ViciError::Refused { command, said: "it has no such command".into() });
                }
                _ => return Err(ViciError::Garbled { command }),
            }
        }
    }

    /// The next event, however long that takes. Not to be cancelled: half a packet would be lost.
    pub(super) async fn event(&mut self) -> Result<(String, Section), ViciError> {
        loop {
            if let Answer::Event(name, section) = self.read("events").await? {
                return Ok((name, section));
            }
        }
    }

    async fn answer(&mut self, command: &'static str) -> Result<Answer, ViciError> {
        timeout(ANSWER_MAX, self.read(command)).await.map_err(|_| ViciError::Silent { command })?
    }

    async fn read(&mut self, command: &'static str) -> Result<Answer, ViciError> {
        let len = self.0.read_u32().await? as usize;
        if len > PACKET_MAX {
            return Err(ViciError::Garbled { command });
        }
        let mut packet = vec![0; len];
        self.0.read_exact(&mut packet).await?;
        Answer::parse(&packet).ok_or(ViciError::Garbled { command })
    }
}
