//! Runs linechat-client in a real terminal emulator, tmux: types keys and reads the screen.
//!
//!     cargo test --test tmux -- --ignored        needs tmux

mod person;
#[path = "../suite/process.rs"]
mod process;

use person::{start, Person};
use process::STUCK;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::mpsc::{channel, Receiver};
use std::thread;
use std::time::Instant;

/// A tmux window with a shell. Each test has a tmux server of its own.
struct Window {
    socket: String,
}

/// Shows whether the terminal has the settings that it had before the client was started.
const CHECK: &str = "[ \"$(stty -g)\" = \"$before\" ] && echo as before";

impl Window {
    /// Starts a client as ana from a shell, which shows its exit status and `CHECK` after it.
    fn open(address: &str, [columns, rows]: [&str; 2]) -> Window {
        // While a server listens there, no other test has this address.
        let window = Window { socket: format!("linechat-{address}") };
        let shell = "PS1='% ' ENV= LC_ALL=C.UTF-8 exec sh -i";
        window.tmux(&["new-session", "-d", "-x", columns, "-y", rows, shell]);
        window.await_rows(&["%"]);
        let client = env!("CARGO_BIN_EXE_linechat-client");
        let client = format!("{client} --no-time {address} ana");
        window.enter(&format!("before=$(stty -g); clear; {client}; echo exit $?; {CHECK}"));
        window
    }

    fn tmux(&self, arguments: &[&str]) -> String {
        let mut command = Command::new("tmux");
        // The window uses UTF-8, whatever the locale of the test.
        command.args(["-u", "-f", "/dev/null", "-L", &self.socket]).args(arguments);
        let output = command.output().expect("tmux can be run");
        assert!(output.status.success(), "tmux {arguments:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
    }

    fn type_text(&self, text: &str) {
        self.tmux(&["send-keys", "-l", text]);
    }

    fn press(&self, keys: &[&str]) {
        self.tmux(&[&["send-keys"], keys].concat());
    }

    fn enter(&self, line: &str) {
        self.type_text(line);
        self.press(&["Enter"]);
    }

    /// Waits until the last rows are these.
    fn await_rows(&self, expected: &[&str]) {
        self.await_screen(&format!("{expected:#?}"), |rows| rows.ends_with(expected));
    }

    /// Waits until the rows are as expected, and returns them.
    fn await_screen(&self, what: &str, is_expected: impl Fn(&[&str]) -> bool) -> Vec<String> {
        let since = Instant::now();
        loop {
            let screen = self.tmux(&["capture-pane", "-p"]);
            let rows: Vec<_> = screen.lines().map(str::trim_end).collect();
            if is_expected(&rows) {
                return rows.into_iter().map(str::to_owned).collect();
            }
            assert!(since.elapsed() < STUCK, "{what} does not come: {rows:#?}");
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let _ = Command::new("tmux").args(["-L", &self.socket, "kill-server"]).status();
    }
}

/// Types a long line with wide characters and accents, with a message from bob between any two keys.
/// Then resizes the window, which must neither leave a second copy of the line nor erase messages.
#[test]
#[ignore = "needs tmux"]
fn a_long_line_is_edited_during_a_flood() {
    let line: String = (0..6).map(|round| format!("mañana 日本 👍 <{round}>e\u{301}")).collect();
    // The window, the beginning of its last row, and the cursor's column at the end of that row.
    for (size, beginning, column) in
        [(["80", "24"], "> <ñana 日本 👍 <2>", "77"), (["40", "10"], "> <mañana 日本 👍 <5>", "22")]
    {
        let server = start("");
        let mut bob = Person::join(&server.address, "bob");
        let window = Window::open(&server.address, size);
        window.await_rows(&["Users online (2): ana, bob", ">"]);
        let mut count = 0;
        for round in 0..6 {
            for character in "mañana 日本 👍 e\u{301}!".chars() {
                window.type_text(&character.to_string());
                count += 1;
                bob.say(&format!("MSG flood {count}"));
            }
            // Removes the exclamation mark and inserts a word before the accented letter.
            window.press(&["BSpace", "Left", &format!("<{round}>"), "Home", "Right", "End"]);
        }
        let last = format!("bob: flood {count}");
        let is_shown = |row: &str, beginning: &str| {
            row.starts_with(beginning) && line.ends_with(row.trim_start_matches("> <"))
        };
        let rows = window.await_screen(beginning, |rows| match rows {
            [.., above, row] => *above == last && is_shown(row, beginning),
            _ => false,
        });
        assert_eq!(window.tmux(&["display-message", "-p", "#{cursor_x}"]), column);
        // Every row above holds a whole message, once and in order.
        let above = rows.len() - 1;
        let flood = (count - above + 1..=count).map(|number| format!("bob: flood {number}"));
        assert!(rows[..above].iter().cloned().eq(flood), "{rows:#?}");
        // tmux folds the line that is being typed; its rows are erased, and the messages stay.
        for (columns, beginning) in [
            ("60", "> <ñana 日本 👍 <3>"),
            ("35", "> <ñana 日本 👍 <5>"),
            ("20", "> <a 日本 👍 <5>"),
            ("90", "> <日本 👍 <2>"),
        ] {
            window.tmux(&["resize-window", "-x", columns]);
            let rows = window.await_screen(beginning, |rows| {
                rows.last().is_some_and(|row| is_shown(row, beginning))
            });
            let is_there_once = |text| rows.iter().filter(|row| row.contains(text)).count() == 1;
            assert!(is_there_once(&*last) && is_there_once("日本"), "{rows:#?}");
        }
        window.press(&["Enter"]);
        assert_eq!(bob.until("MSG ana"), format!("MSG ana {line}"));
        window.press(&["C-d"]);
        window.await_rows(&["exit 0", "as before", "%"]);
    }
}

/// The client must have its keys again after the shell, which has changed the settings, resumes it.
/// After Ctrl-Z the terminal has its settings back; SIGSTOP leaves the client no time for that.
#[test]
#[ignore = "needs tmux"]
fn the_client_can_be_suspended() {
    for is_stopped in [false, true] {
        let server = start("");
        let mut bob = Person::join(&server.address, "bob");
        let window = Window::open(&server.address, ["80", "24"]);
        window.await_rows(&["Users online (2): ana, bob", ">"]);
        window.type_text("half");
        window.await_rows(&["> half"]);
        if is_stopped {
            let shell = window.tmux(&["display-message", "-p", "#{pane_pid}"]);
            let client = Command::new("pgrep").args(["-P", &shell]).output().expect("pgrep");
            let client = String::from_utf8_lossy(&client.stdout).trim().parse().expect("a process");
            process::signal(client, "STOP").expect("the signal is sent");
        } else {
            window.press(&["C-z"]);
        }
        window.await_rows(&["%"]);
        bob.say("MSG are you there?");
        window.enter(&format!("clear; {CHECK}; stty sane"));
        window.await_rows(if is_stopped { &["%"] } else { &["as before", "%"] });
        window.enter("fg");
        window.await_rows(&["bob: are you there?", "> half"]);
        window.press(&["Left", "Left", "BSpace", "e", "Enter"]);
        assert_eq!(bob.until("MSG ana"), "MSG ana helf");
        window.press(&["C-d"]);
        window.await_rows(&["%"]);
    }
}

/// Answers the client's next connection, whose name must be ana, with these lines.
fn serve(accepted: &Receiver<TcpStream>, lines: &str) -> BufReader<TcpStream> {
    let socket = accepted.recv_timeout(STUCK).expect("a connection");
    socket.set_read_timeout(Some(STUCK)).expect("a time-out");
    let mut client = BufReader::new(socket);
    client.get_mut().write_all(b"HELLO linechat/1\r\n").expect("the client reads");
    assert_eq!(next_line(&mut client), "NAME ana\n");
    client.get_mut().write_all(lines.as_bytes()).expect("the client reads");
    client
}

fn next_line(client: &mut BufReader<TcpStream>) -> String {
    let mut line = String::new();
    client.read_line(&mut line).expect("a line in time");
    line
}

#[test]
#[ignore = "needs tmux"]
fn the_client_returns_when_its_connection_was_lost() {
    const WELCOME: &str = "WELCOME ana 1\r\nUSERS 1 ana\r\n";
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let (sender, accepted) = channel();
    thread::spawn(move || {
        listener.incoming().map_while(Result::ok).try_for_each(|it| sender.send(it))
    });
    let window = Window::open(&address.to_string(), ["80", "24"]);
    let connection = serve(&accepted, WELCOME);
    window.await_rows(&["Users online (1): ana", ">"]);
    window.type_text("half a");
    window.await_rows(&["> half a"]);
    drop(connection);
    // The editor stays, and works.
    window.await_rows(&["(not connected, attempt 1) > half a"]);
    window.type_text(" line");
    window.await_rows(&["(not connected, attempt 1) > half a line"]);
    // The server may not know yet that the old connection is lost, so the name is taken.
    let _refused = serve(&accepted, "ERR name-taken by the old connection\r\n");
    let mut client = serve(&accepted, WELCOME);
    window.await_rows(&["Connected again, ana.", "Users online (1): ana", "> half a line"]);
    window.press(&["Enter"]);
    assert_eq!(next_line(&mut client), "MSG half a line\n");
}
