# Run as the guest's root: has its own connections seem to have ended to whoever follows them first, and to nobody behind. Stays, with
# those connections open, until it is ended; ordinary ones it opens and closes before.
import socket, struct, subprocess, sys, time
server, server6, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
own_mac, gateway_mac = bytes.fromhex('026f63000002'), bytes.fromhex('026f63000001')
own, own6 = '198.18.0.2', 'fdb7:1e5c:c00::2'
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
raw.bind(('eth0', 0))
raw.settimeout(30)
TCP, HOPOPTS, FRAGMENT = 6, 0, 44
ACK, RST = 0x10, 0x04

def checksum(data):
    data += b'\0' * (len(data) % 2)
    total = sum(struct.unpack('!%dH' % (len(data) // 2), data))
    while total >> 16: total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff

def connect(address):
    """A connection, its port, and the numbers that its next segment has."""
    one = socket.create_connection((address, port), 30)
    local = one.getsockname()[1]
    one.sendall(b'0')
    while True:
        frame = raw.recv(65535)
        at = 14 + (40 if ':' in address else 20)
        if len(frame) < at + 20 or frame[6:12] != own_mac: continue
        source, target, sequence, acknowledged, offset, flags = struct.unpack('!HHIIBB', frame[at:at + 14])
        payload = frame[at + (offset >> 4) * 4:]
        if (source, target) == (local, port) and flags & ACK and payload.startswith(b'0'):
            return one, local, sequence + 1, acknowledged

def segment(address, local, sequence, acknowledged, payload):
    """What resets it."""
    tcp = struct.pack('!HHIIBBHHH', local, port, sequence, acknowledged, 0x50, ACK | RST, 1024, 0, 0) + payload
    family, source = (socket.AF_INET6, own6) if ':' in address else (socket.AF_INET, own)
    ends = socket.inet_pton(family, source) + socket.inet_pton(family, address)
    pseudo = ends + (struct.pack('!IxxxB', len(tcp), TCP) if ':' in address else struct.pack('!xBH', TCP, len(tcp)))
    return tcp[:16] + struct.pack('!H', checksum(pseudo + tcp)) + tcp[18:]

def frame4(address, tcp):
    head = struct.pack('!BBHHHBBH4s4s', 0x45, 0, 20 + len(tcp), 1, 0x4000, 64, TCP, 0, socket.inet_aton(own), socket.inet_aton(address))
    return gateway_mac + own_mac + b'\x08\x00' + head[:10] + struct.pack('!H', checksum(head)) + head[12:] + tcp

def frame6(address, first, body):
    head = struct.pack('!IHBB', 6 << 28, len(body), first, 64)
    return gateway_mac + own_mac + b'\x86\xdd' + head + socket.inet_pton(socket.AF_INET6, own6) + socket.inet_pton(socket.AF_INET6, address) + body

for _ in range(20):
    one = socket.create_connection((server, port), 30)
    one.close()
kept = []
def may_be(mtu): subprocess.run(['ip', 'link', 'set', 'eth0', 'mtu', str(mtu)], check=True)
# Too large for whatever is behind: it is known there, or nowhere.
for address in [server, server6]:
    one, *numbers = connect(address)
    kept.append(one)
    large = segment(address, *numbers, bytes(1600))
    may_be(3000)
    raw.send(frame4(address, large) if address == server else frame6(address, TCP, large))
    may_be(1500)
# In a fragment that is whole, behind an option that whoever does not know it throws the packet away for.
one, *numbers = connect(server6)
kept.append(one)
options = struct.pack('!BBBBBBBB', TCP, 0, 0x7e, 4, 0, 0, 0, 0)
fragment = struct.pack('!BBHI', HOPOPTS, 0, 0, 77)
raw.send(frame6(server6, FRAGMENT, fragment + options + segment(server6, *numbers, b'')))
print(one.getsockname()[1], flush=True)
# Who is silent is hung up on.
for _ in range(15):
    time.sleep(5)
    one.sendall(b'0')
time.sleep(10000)
