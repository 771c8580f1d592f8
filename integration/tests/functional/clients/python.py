"""What a user of the published Python client does, one check after another; prints `ok NAME` for each that holds.

The mesh is named by the variables that the client reads. Arguments are beginnings of names of checks; all run without.
"""

import asyncio
import hashlib
import os
import pathlib
import sys
import traceback

import httpx
import websockets
from opencomputer import Sandbox, ShellBusyError, ShellClosedError

URL, KEY = os.environ["OPENCOMPUTER_API_URL"], os.environ["OPENCOMPUTER_API_KEY"]
# Answers an agent in the sandbox what its prompts say.
MESSAGES_API = pathlib.Path(__file__).parents[3] / "src/messages_api.py"
MESSAGES_PORT = 8399
# Seconds; guests are emulated and the machine is busy.
PATIENCE, CHECK_PATIENCE = 120, 400
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def equal(got, wanted):
    if got != wanted:
        raise AssertionError(f"got {got!r:.800}, wanted {wanted!r:.800}")


async def until(condition, what):
    """Waits for something that a callback brings; `what` says how far it is."""
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            raise AssertionError(f"not within {PATIENCE} s: {what()!r:.800}")
        await asyncio.sleep(0.02)


async def refused(call, status):
    """The call must be refused with this HTTP status, over HTTP or before a WebSocket is there."""
    try:
        await call
    except httpx.HTTPStatusError as error:
        equal(error.response.status_code, status)
        assert error.response.json()["error"], error.response.text
    except websockets.InvalidStatus as error:
        equal(error.response.status_code, status)
    else:
        raise AssertionError(f"not refused, {status} expected")


async def rest(method, path, **more):
    """A call that the client has no method for."""
    async with httpx.AsyncClient(base_url=f"{URL.rstrip('/')}/api", headers={"X-API-Key": KEY}, timeout=30) as http:
        answer = await http.request(method, path, **more)
    answer.raise_for_status()
    return answer


class Watcher:
    """What one attached client is told, in its order."""

    def __init__(self):
        self.out, self.err, self.exits, self.order = b"", b"", [], []
        self.replayed = None
        self.callbacks = dict(
            on_stdout=self.stdout, on_stderr=self.stderr, on_exit=self.exit, on_scrollback_end=self.scrollback_end
        )

    def stdout(self, chunk):
        self.out += chunk
        self.order.append("out")

    def stderr(self, chunk):
        self.err += chunk
        self.order.append("err")

    def exit(self, code):
        self.exits.append(code)
        self.order.append("exit")

    def scrollback_end(self):
        self.replayed = self.out
        self.order.append("scrollback end")

    async def sees(self, text):
        await until(lambda: text in self.out, lambda: self.out)


async def ends(session):
    """The exit code of a session."""
    return await asyncio.wait_for(asyncio.shield(session.done), PATIENCE)


# --- the sandbox itself -------------------------------------------------------------------------------------------


@check
async def a_sandbox_is_created_and_connected_to(sandbox):
    assert sandbox.sandbox_id.startswith("sb-"), sandbox.sandbox_id
    equal((sandbox.id, sandbox.status, sandbox.template), (sandbox.sandbox_id, "running", "base"))
    assert await sandbox.is_running()
    again = await Sandbox.connect(sandbox.sandbox_id)
    equal((again.sandbox_id, again.status, again.template), (sandbox.sandbox_id, "running", "base"))
    equal((await again.exec.run("echo $A")).stdout, "b\n")
    await again.close()
    await sandbox.set_timeout(60)
    facts = (await rest("GET", f"/sandboxes/{sandbox.sandbox_id}")).json()
    equal((facts["timeout"], facts["metadata"]), (60, {"k": "v"}))
    await sandbox.set_timeout(0)
    await refused(Sandbox.connect("sb-00000000000000000000"), 404)
    await refused(Sandbox.connect(sandbox.sandbox_id, api_key="osb_" + "0" * 64), 403)


# --- commands -----------------------------------------------------------------------------------------------------


@check
async def a_command_is_run(sandbox):
    ran = await sandbox.exec.run("echo $A $B; pwd; echo err >&2; exit 3", env={"B": "c"}, cwd="/tmp")
    equal((ran.exit_code, ran.stdout, ran.stderr), (3, "b c\n/tmp\n", "err\n"))
    equal((await sandbox.commands.run("pwd; id -un")).stdout, "/home/sandbox\nsandbox\n")
    equal((await sandbox.exec.run("kill -9 $$")).exit_code, 137)
    equal((await sandbox.exec.run("no-such-command-anywhere")).exit_code, 127)


@check
async def output_that_is_no_text_comes_as_text(sandbox):
    ran = await sandbox.exec.run(r"printf 'a\377b\0c'; printf '\303' >&2")
    equal((ran.stdout, ran.stderr), ("a\ufffdb\0c", "\ufffd"))
    # Characters of several bytes, wherever the output is cut on its way.
    ran = await sandbox.exec.run("yes 'x\U0001f600é' | head -n 100000")
    equal(hashlib.sha256(ran.stdout.encode()).hexdigest(), hashlib.sha256("x\U0001f600é\n".encode() * 100000).hexdigest())


@check
async def a_command_that_takes_too_long_is_ended(sandbox):
    ran = await sandbox.exec.run("echo begun; sleep 30", timeout=5)
    equal((ran.exit_code, ran.stdout), (-1, "begun\n"))
    assert "timeout" in ran.stderr, ran.stderr


# --- sessions -----------------------------------------------------------------------------------------------------

DIALOGUE = "echo out $B; pwd; echo err >&2; read line; echo got $line; exit 4"


@check
async def a_session_is_talked_to(sandbox):
    seen = Watcher()
    session = await sandbox.exec.start("sh", args=["-c", DIALOGUE], env={"B": "c"}, cwd="/tmp", **seen.callbacks)
    await seen.sees(b"out c\n/tmp\n")
    await until(lambda: seen.err == b"err\n", lambda: seen.err)
    listed = {one.session_id: one for one in await sandbox.exec.list()}[session.session_id]
    equal((listed.sandbox_id, listed.command, listed.args), (sandbox.sandbox_id, "sh", ["-c", DIALOGUE]))
    equal((listed.running, listed.exit_code, listed.attached_clients), (True, None, 1))
    assert listed.started_at, listed
    await session.send_stdin("hel")
    await session.send_stdin(b"lo\n")
    equal(await ends(session), 4)
    equal((seen.out, seen.err, seen.exits), (b"out c\n/tmp\ngot hello\n", b"err\n", [4]))
    equal((seen.order.count("scrollback end"), seen.order[-1]), (1, "exit"))

    # Attached to when it is over, it says all of it again.
    late = Watcher()
    session = await sandbox.exec.attach(session.session_id, **late.callbacks)
    equal(await ends(session), 4)
    equal((late.out, late.err, late.replayed), (seen.out, seen.err, seen.out))
    equal(late.order[-2:], ["scrollback end", "exit"])
    listed = {one.session_id: one for one in await sandbox.exec.list()}[session.session_id]
    equal((listed.running, listed.exit_code), (False, 4))


@check
async def a_client_that_comes_later_is_shown_what_it_missed(sandbox):
    first, second, third = Watcher(), Watcher(), Watcher()
    count = "seq -f 'line %g' 5; read go; seq -f 'line %g' 6 60; read line"
    session = await sandbox.exec.background("sh", args=["-c", count], on_stdout=first.stdout, on_exit=first.exit)
    await first.sees(b"line 5\n")
    other = await sandbox.exec.attach(session.session_id, **second.callbacks)
    await until(lambda: second.replayed is not None, lambda: second.order)
    assert b"line 5\n" in second.replayed and b"line 60\n" not in second.replayed, second.replayed
    # One that goes disturbs neither the process nor the other.
    await session.close()
    await other.send_stdin("go\n")
    await second.sees(b"line 60\n")
    lines = b"".join(b"line %d\n" % number for number in range(1, 61))
    equal(second.out, lines)
    last = await sandbox.exec.attach(session.session_id, **third.callbacks)
    await until(lambda: third.replayed is not None, lambda: third.order)
    equal((third.replayed, third.out), (lines, lines))
    await last.send_stdin("done\n")
    equal((await ends(last), await ends(other)), (0, 0))


@check
async def bytes_come_through_a_session_unchanged(sandbox):
    seen = Watcher()
    script = "read go; head -c 3000000 /dev/urandom | tee sent; read go; head -c 1000000 | sha256sum"
    session = await sandbox.exec.start("sh", args=["-c", script], **seen.callbacks)
    await session.send_stdin("go\n")
    await until(lambda: len(seen.out) >= 3_000_000, lambda: len(seen.out))
    equal(hashlib.sha256(seen.out).hexdigest(), hashlib.sha256(await sandbox.files.read_bytes("sent")).hexdigest())
    sent = os.urandom(1_000_000)
    await session.send_stdin("go\n")
    # One message that is large, and many that are not.
    await session.send_stdin(sent[:500_000])
    for begin in range(500_000, 1_000_000, 20_000):
        await session.send_stdin(sent[begin : begin + 20_000])
    equal(await ends(session), 0)
    equal(seen.out[3_000_000:].split()[0], hashlib.sha256(sent).hexdigest().encode())


@check
async def a_session_is_killed(sandbox):
    killed, told = await sandbox.exec.start("sleep", args=["300"]), await sandbox.exec.start("sleep", args=["300"])
    await killed.kill()
    await sandbox.exec.kill(told.session_id, signal=15)
    equal((await ends(killed), await ends(told)), (137, 143))
    await sandbox.exec.kill(told.session_id)
    await refused(sandbox.exec.kill("none"), 404)
    await refused(sandbox.exec.attach("none"), 404)


@check
async def a_session_ends_by_itself_as_it_was_told(sandbox):
    seen = Watcher()
    limited = await sandbox.exec.start("sleep", args=["300"], timeout=1, **seen.callbacks)
    left = await sandbox.exec.start("sleep", args=["300"], max_run_after_disconnect=1)
    stays = await sandbox.exec.start("sleep", args=["300"])
    await left.close()
    await stays.close()
    equal((await ends(limited), seen.exits), (-1, [-1]))
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while True:
        running = {one.session_id: one.running for one in await sandbox.exec.list()}
        if not running[left.session_id]:
            break
        assert asyncio.get_running_loop().time() < deadline, running
        await asyncio.sleep(0.1)
    assert running[stays.session_id], running
    await sandbox.exec.kill(stays.session_id)


# --- shells -------------------------------------------------------------------------------------------------------


@check
async def a_shell_remembers(sandbox):
    shell = await sandbox.exec.shell(cwd="/tmp", env={"B": "c"})
    ran = await shell.run("pwd; echo $A $B")
    equal((ran.exit_code, ran.stdout, ran.stderr), (0, "/tmp\nb c\n", ""))
    equal((await shell.run("cd /usr; export C=d; f() { echo in f >&2; return 5; }")).exit_code, 0)
    seen = Watcher()
    ran = await shell.run("pwd; echo $C; f", on_stdout=seen.stdout, on_stderr=seen.stderr)
    equal((ran.exit_code, ran.stdout, ran.stderr), (5, "/usr\nd\n", "in f\n"))
    equal((seen.out, seen.err), (b"/usr\nd\n", b"in f\n"))
    equal((await shell.run("")).exit_code, 0)
    equal((await shell.run("for i in 1 2\ndo\n  echo $i\ndone\nfalse")).stdout, "1\n2\n")
    ran = await shell.run("seq 1 20000; seq 1 20000 >&2")
    equal((len(ran.stdout), len(ran.stderr)), (108894, 108894))
    slow = asyncio.create_task(shell.run("sleep 0.5; echo slow"))
    await asyncio.sleep(0)
    try:
        await shell.run("true")
        raise AssertionError("two commands at once")
    except ShellBusyError:
        pass
    equal((await slow).stdout, "slow\n")

    again = await sandbox.exec.reattach_shell(shell.session_id)
    # What it said before is not taken for its answer.
    ran = await again.run("pwd; echo $C")
    equal((ran.exit_code, ran.stdout, ran.stderr), (0, "/usr\nd\n", ""))
    await again.close()
    equal((await ends(again._session), await ends(shell._session)), (0, 0))
    try:
        await shell.run("true")
        raise AssertionError("a shell that is closed runs a command")
    except ShellClosedError:
        pass


@check
async def a_shell_that_exits_is_closed(sandbox):
    shell = await sandbox.exec.shell()
    try:
        await shell.run("exit 3")
        raise AssertionError("a shell answers after its end")
    except ShellClosedError as error:
        assert "3" in str(error), error


# --- terminals ----------------------------------------------------------------------------------------------------


class Screen:
    """What comes out of a terminal."""

    def __init__(self, pty):
        self.pty, self.text = pty, b""

    async def shows(self, text):
        async def read():
            while text not in self.text:
                self.text += await self.pty.recv()

        try:
            await asyncio.wait_for(read(), PATIENCE)
        except TimeoutError:
            raise AssertionError(f"no {text!r} in {self.text!r}") from None
        self.text = self.text.partition(text)[2]

    async def closes(self):
        """How the server closes it."""
        try:
            while True:
                await asyncio.wait_for(self.pty.recv(), PATIENCE)
        except websockets.ConnectionClosed as closed:
            return closed.rcvd and closed.rcvd.code


@check
async def a_terminal_is_typed_at(sandbox):
    pty = await sandbox.pty.create(cols=100, rows=30)
    screen = Screen(pty)
    await pty.send("tty; stty size; echo mark$((40 + 2))\n")
    await screen.shows(b"/dev/pts/")
    await screen.shows(b"30 100\r\n")
    await screen.shows(b"mark42\r\n")
    path = f"/sandboxes/{sandbox.sandbox_id}/pty/{pty.session_id}"
    await rest("POST", f"{path}/resize", json={"cols": 132, "rows": 50})
    await pty.send(b"stty size\n")
    await screen.shows(b"50 132\r\n")
    await pty.send("sleep 300; echo 'not '$((1 + 1))\n")
    # Before the shell has handed the terminal over, a Ctrl-C would be its own.
    async with asyncio.timeout(PATIENCE):
        while (await sandbox.exec.run("ps -o stat= -C sleep | grep -q '^S.*+'")).exit_code:
            await asyncio.sleep(0.1)
    await pty.send("\x03")
    await pty.send("echo still $((1 + 2))\n")
    await screen.shows(b"still 3\r\n")
    await pty.send("exit\n")
    equal(await screen.closes(), 1000)
    await pty.close()


@check
async def a_terminal_calls_back_and_is_deleted(sandbox):
    seen = Watcher()
    pty = await sandbox.pty.create(on_output=seen.stdout)
    await pty.send("stty size; echo $((40 + 2))\r")
    await seen.sees(b"24 80\r\n42\r\n")
    await rest("DELETE", f"/sandboxes/{sandbox.sandbox_id}/pty/{pty.session_id}")
    await asyncio.wait_for(pty._read_task, PATIENCE)
    await pty.close()


# --- files --------------------------------------------------------------------------------------------------------


@check
async def files_come_back_as_they_went(sandbox):
    files, every = sandbox.files, bytes(range(256)) * 3
    await files.write("dir/sub/text", "täxt\n")
    equal(await files.read("dir/sub/text"), "täxt\n")
    await files.write("/home/sandbox/dir/ü & ?#%.bin", every)
    equal(await files.read_bytes("dir/ü & ?#%.bin"), every)

    async def pieces():
        for number in range(300):
            yield bytes([number % 256]) * 10_000

    await files.write("dir/streamed", pieces())
    equal(await files.read_bytes("dir/streamed"), b"".join([piece async for piece in pieces()]))
    await files.write("dir/empty", b"")
    equal(await files.read_bytes("dir/empty"), b"")
    listed = {entry.name: entry for entry in await files.list("/home/sandbox/dir")}
    equal(sorted(listed), ["empty", "streamed", "sub", "ü & ?#%.bin"])
    streamed, sub = listed["streamed"], listed["sub"]
    equal((streamed.is_dir, streamed.path, streamed.size), (False, "/home/sandbox/dir/streamed", 3_000_000))
    equal((sub.is_dir, sub.path), (True, "/home/sandbox/dir/sub"))
    await files.make_dir("made/of/many")
    await files.make_dir("made/of/many")
    equal(await files.list("made/of/many"), [])
    assert await files.exists("dir/streamed")
    # To this client a directory is nothing that exists.
    assert not await files.exists("dir/none") and not await files.exists("made")
    await files.remove("dir")
    assert not await files.exists("dir/streamed")
    await refused(files.read("dir/streamed"), 404)


@check
async def a_signed_url_needs_no_key(sandbox):
    await sandbox.files.write("signed/ü file", "for anyone")
    async with httpx.AsyncClient(timeout=30) as anyone:
        url = await sandbox.download_url("/home/sandbox/signed/ü file")
        answer = await anyone.get(url)
        equal((answer.status_code, answer.text), (200, "for anyone"))
        upload = await sandbox.upload_url("/home/sandbox/signed/came", expires_in=60)
        answer = await anyone.put(upload, content=b"from anyone")
        assert answer.status_code in (200, 204), answer
        equal(await sandbox.files.read("signed/came"), "from anyone")
        # Neither for the other direction, nor another file, nor with anything changed.
        equal((await anyone.put(url, content=b"x")).status_code in (403, 404, 405), True)
        signed = httpx.URL(url)
        for change in ({"path": "/etc/passwd"}, {"expires": "99999999999"}, {"signature": "0" * 64}):
            equal((await anyone.get(signed.copy_merge_params(change))).status_code, 403)
        brief = await sandbox.download_url("/home/sandbox/signed/ü file", expires_in=1)
        # Clocks may differ by five seconds.
        await asyncio.sleep(7.1)
        equal((await anyone.get(brief)).status_code, 403)


# --- agents -------------------------------------------------------------------------------------------------------


class Agent:
    """An agent's events, as one attached client is told them."""

    def __init__(self):
        self.events, self.log = [], []
        self.callbacks = dict(on_event=self.events.append, on_error=self.log.append)

    async def says(self, kind, count=1):
        """Waits until there are so many events of this type; returns the last."""
        await until(lambda: self.count(kind) >= count, lambda: ([event.type for event in self.events], self.log))
        return [event for event in self.events if event.type == kind][-1]

    def count(self, kind):
        return sum(event.type == kind for event in self.events)


@check
async def an_agent_is_prompted_and_interrupted(sandbox):
    await sandbox.files.write("messages_api.py", MESSAGES_API.read_bytes())
    await sandbox.exec.background("python3", args=["messages_api.py", str(MESSAGES_PORT)])
    listens = f"until (: > /dev/tcp/127.0.0.1/{MESSAGES_PORT}) 2>&-; do sleep 0.1; done"
    equal((await sandbox.exec.run(f"bash -c '{listens}'")).exit_code, 0)

    seen, late = Agent(), Agent()
    prompt = "step: write /home/sandbox/by-agent made by it\nstep: say written"
    agent = await sandbox.agent.start(prompt=prompt, system_prompt="Do as you are told.", **seen.callbacks)
    ended = asyncio.create_task(agent.wait())
    await seen.says("turn_complete")
    equal((await seen.says("result"))["result"], "written")
    equal(await sandbox.files.read("by-agent"), "made by it")
    equal(seen.events[0].type, "ready")
    assert {"system", "assistant", "user"} <= {event.type for event in seen.events}, seen.events

    before, configured = seen.count("system"), seen.count("configured")
    agent.send_prompt("step: count 2000 50")
    await seen.says("system", before + 1)
    agent.interrupt()
    await seen.says("interrupted")
    agent.configure(max_turns=3)
    await seen.says("configured", configured + 1)
    agent.send_prompt("step: say still there")
    await seen.says("turn_complete", 2)
    equal((await seen.says("result"))["result"], "still there")

    listed = {one.session_id: one for one in await sandbox.agent.list()}[agent.session_id]
    equal((listed.sandbox_id, listed.running), (sandbox.sandbox_id, True))
    # Who comes later is told the same.
    other = await sandbox.agent.attach(agent.session_id, **late.callbacks)
    other_ended = asyncio.create_task(other.wait())
    await until(lambda: len(late.events) >= len(seen.events), lambda: late.events)
    equal(late.events, seen.events)
    await agent.kill()
    equal((await asyncio.wait_for(ended, PATIENCE), await asyncio.wait_for(other_ended, PATIENCE)), (137, 137))
    equal([one.running for one in await sandbox.agent.list()], [False])
    await refused(sandbox.agent.attach("none"), 404)


# --- sleep, checkpoints -------------------------------------------------------------------------------------------


@check
async def a_session_sleeps_and_wakes_with_its_sandbox(sandbox):
    seen, after = Watcher(), Watcher()
    count = "i=0; while ! test -e stop; do i=$((i + 1)); echo line $i; sleep 0.1; done; exit 6"
    session = await sandbox.exec.start("sh", args=["-c", count], **seen.callbacks)
    shell = await sandbox.exec.shell()
    await shell.run("cd /usr; C=d")
    await seen.sees(b"line 3\n")
    await sandbox.hibernate()
    # The connection ends, and not the session.
    equal((await ends(session), seen.exits), (-1, [-1]))
    assert not await sandbox.is_running()
    await sandbox.wake(timeout=0)
    assert await sandbox.is_running()
    session = await sandbox.exec.attach(session.session_id, **after.callbacks)
    await until(lambda: after.replayed is not None, lambda: after.order)
    assert after.out.startswith(seen.out), (seen.out, after.out)
    before = after.out.count(b"\n")
    await after.sees(b"line %d\n" % (before + 3))
    again = await sandbox.exec.reattach_shell(shell.session_id)
    equal((await again.run("pwd; echo $C")).stdout, "/usr\nd\n")
    await again.close()
    await sandbox.files.write("stop", "")
    equal(await ends(session), 6)
    count = after.out.count(b"\n")
    equal(after.out, b"".join(b"line %d\n" % number for number in range(1, count + 1)))
    await sandbox.files.remove("stop")


@check
async def any_call_wakes_a_sandbox(sandbox):
    await sandbox.files.write("slept", "here")
    await sandbox.hibernate()
    equal((await sandbox.exec.run("cat slept; echo $A")).stdout, "hereb\n")
    await sandbox.hibernate()
    equal(await sandbox.files.read("slept"), "here")
    await sandbox.hibernate()
    shell = await sandbox.exec.shell()
    equal((await shell.run("cat slept")).stdout, "here")
    await shell.close()


@check
async def a_checkpoint_is_gone_back_to_and_forked(sandbox):
    await sandbox.files.write("state", "one")
    taken = await sandbox.create_checkpoint("one")
    equal((taken["status"], taken["name"]), ("ready", "one"))
    await sandbox.files.write("state", "two")
    equal([one["name"] for one in await sandbox.list_checkpoints()], ["one"])
    await refused(sandbox.create_checkpoint("one"), 409)
    fork = await Sandbox.create_from_checkpoint(taken["id"], timeout=60, envs={"A": "c"})
    assert fork.sandbox_id != sandbox.sandbox_id
    equal((await fork.exec.run("cat state; echo $A")).stdout, "onec\n")
    seen = Watcher()
    session = await fork.exec.start("sh", args=["-c", "cat state; exit 8"], **seen.callbacks)
    equal((await ends(session), seen.out), (8, b"one"))
    await fork.kill()
    await fork.close()
    await sandbox.restore_checkpoint(taken["id"])
    equal((await sandbox.exec.run("cat state")).stdout, "one")
    session = await sandbox.exec.start("sh", args=["-c", "cat state; exit 9"])
    equal(await ends(session), 9)
    await sandbox.delete_checkpoint(taken["id"])
    await sandbox.delete_checkpoint(taken["id"])
    equal(await sandbox.list_checkpoints(), [])


# --- the end ------------------------------------------------------------------------------------------------------


async def main():
    chosen = [one for one in CHECKS if not sys.argv[1:] or one.__name__.startswith(tuple(sys.argv[1:]))]
    assert chosen, "no check has such a name"
    model = {"ANTHROPIC_BASE_URL": f"http://127.0.0.1:{MESSAGES_PORT}", "ANTHROPIC_API_KEY": "sk-ant-none"}
    sandbox = await Sandbox.create(template="base", timeout=0, envs={"A": "b", **model}, metadata={"k": "v"})
    try:
        for one in chosen:
            try:
                async with asyncio.timeout(CHECK_PATIENCE):
                    await one(sandbox)
            except (Exception, asyncio.CancelledError):
                print(f"failed {one.__name__}\n{traceback.format_exc()}", file=sys.stderr)
                sys.exit(1)
            print("ok", one.__name__, flush=True)
    finally:
        await sandbox.kill()
    assert not await sandbox.is_running()
    await sandbox.close()
    print("ok a_sandbox_is_killed")
    print("done", sandbox.sandbox_id)


asyncio.run(main())
