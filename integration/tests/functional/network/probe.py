# Run in the guest with what there may be to reach, as JSON; prints what answers.
import json, socket, subprocess, sys, threading
wanted = json.loads(sys.argv[1])
# Seconds that are waited for what must not come through, and for what must.
IMPATIENT, PATIENT = 5, 40
# How far packets of TCP may go: not past the host, and past it.
HOPS = [1, 2, 3, 8]
echoes, outcomes = [], {}

def family(address): return socket.AF_INET6 if ':' in address else socket.AF_INET

def send(address, port):
    try: socket.socket(family(address), socket.SOCK_DGRAM).sendto(b'probe', (address, port))
    except OSError: pass

def ping(address, *patience):
    command = ['ping', '-q', '-c', '1', *patience, address]
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if ended.returncode == 0: echoes.append(address)

def connect(address, hops):
    one = socket.socket(family(address))
    if ':' in address: one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, hops)
    else: one.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, hops)
    one.settimeout(PATIENT if hops > 3 else IMPATIENT)
    try:
        one.connect((address, wanted['port']))
        outcomes[address, hops] = 'open'
    except TimeoutError: outcomes[address, hops] = 'silence'
    # Such as that somebody on the way says where it ended.
    except OSError as error: outcomes[address, hops] = str(error)

for address in wanted['hosts']: send(address, wanted['service'])
# Behind those, by the same way.
for address in wanted['worlds']: send(address, wanted['port'])
calls = [(ping, address, '-W', str(IMPATIENT)) for address in wanted['hosts']]
calls += [(ping, address, '-w', str(PATIENT)) for address in wanted['worlds']]
calls += [(connect, address, hops) for address in wanted['worlds'] for hops in HOPS]
threads = [threading.Thread(target=call, args=args) for call, *args in calls]
for thread in threads: thread.start()
for thread in threads: thread.join()
connections = {address: [outcomes.get((address, hops)) for hops in HOPS] for address in wanted['worlds']}
print(json.dumps({'echoes': sorted(echoes), 'connections': connections}))
