# Run as the guest's root: packets that are not its own, by every way that a kernel has, and some that are in disguise.
import socket, struct, sys
server, server6, port, gateway_mac = sys.argv[1], sys.argv[2], int(sys.argv[3]), bytes.fromhex('026f63000001')
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
raw.bind(('eth0', 0))
own = bytes.fromhex('026f63000002')
def checksum(data):
    total = sum(struct.unpack('!%dH' % (len(data) // 2), data))
    while total >> 16: total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff
def ip4(source, protocol, body, options=b''):
    length = 20 + len(options)
    head = struct.pack('!BBHHHBBH', 0x40 | length // 4, 0, length + len(body), 1, 0, 64, protocol, 0)
    head += socket.inet_aton(source) + socket.inet_aton(server) + options
    return head[:10] + struct.pack('!H', checksum(head)) + head[12:] + body
def udp4(source, text, options=b''):
    return ip4(source, 17, struct.pack('!HHHH', 4444, port, 8 + len(text), 0) + text, options)
def udp6(source, text, extension=b''):
    pack = lambda a: socket.inet_pton(socket.AF_INET6, a)
    length = 8 + len(text)
    pseudo = pack(source) + pack(server6) + struct.pack('!IxxxB', length, 17)
    body = struct.pack('!HHHH', 4444, port, length, 0) + text
    pad = b'\0' * (len(body) % 2)
    body = body[:6] + struct.pack('!H', checksum(pseudo + body + pad)) + body[8:]
    # In front of it destination options, or nothing (RFC 8200, 4.6).
    head = struct.pack('!IHBB', 6 << 28, len(extension) + length, 60 if extension else 17, 64)
    return head + pack(source) + pack(server6) + extension + body
def frame(mac, kind, payload, to=gateway_mac): raw.send(to + mac + struct.pack('!H', kind) + payload)
frame(own, 0x800, udp4('198.18.0.2', b'honest'))
frame(own, 0x86dd, udp6('fdb7:1e5c:c00::2', b'honest6.'))
for source in ['198.18.0.3', '198.18.0.1', '10.213.0.1', '127.0.0.1', '8.8.8.8', '0.0.0.0', '198.19.0.3']:
    frame(own, 0x800, udp4(source, b'forged ' + source.encode()))
for source in ['fdb7:1e5c:c00::3', 'fe80::1', '2001:4860::1', '::1', 'fdb7:1e5c:c00:1::3']:
    frame(own, 0x86dd, udp6(source, b'forged6 ' + source.encode()))
frame(bytes.fromhex('026f63000009'), 0x800, udp4('198.18.0.2', b'forged mac'))
# In a VLAN's clothes.
frame(own, 0x8100, struct.pack('!HH', 1, 0x800) + udp4('198.18.0.9', b'forged vlan'))
# What some on the way might read otherwise: nothing, and a route to be recorded; padding; neither TCP nor UDP.
for options in [b'\1\1\1\0', b'\7\7\4\0\0\0\0\0']:
    frame(own, 0x800, udp4('198.18.0.2', b'forged options', options))
frame(own, 0x86dd, udp6('fdb7:1e5c:c00::2', b'forged6 extension', b'\x11\0\1\4\0\0\0\0'))
for protocol in [47, 132, 253]:
    frame(own, 0x800, ip4('198.18.0.2', protocol, b'forged protocol '))
# "The gateway's, the resolver's and the host's addresses are mine."
for address in ['198.18.0.1', '198.18.0.53', '198.19.0.2', '198.18.0.2']:
    claimed = bytes.fromhex('026f63000009')
    arp = struct.pack('!HHBBH6s4s6s4s', 1, 0x800, 6, 4, 2, claimed, socket.inet_aton(address), gateway_mac, socket.inet_aton('198.18.0.1'))
    frame(claimed, 0x806, arp); frame(own, 0x806, arp); frame(own, 0x806, arp, b'\xff' * 6)
claim = lambda a: socket.inet_pton(socket.AF_INET6, a)
for address in ['fdb7:1e5c:c00::2', 'fdb7:1e5c:c00::1']:
    body = struct.pack('!BBHI', 136, 0, 0, 0x60000000) + claim(address) + b'\x02\x01' + bytes.fromhex('026f63000009')
    pseudo = claim('fdb7:1e5c:c00::2') + claim('fdb7:1e5c:c00::1') + struct.pack('!IxxxB', len(body), 58)
    body = body[:2] + struct.pack('!H', checksum(pseudo + body)) + body[4:]
    head = struct.pack('!IHBB', 6 << 28, len(body), 58, 255) + claim('fdb7:1e5c:c00::2') + claim('fdb7:1e5c:c00::1')
    frame(own, 0x86dd, head + body)
frame(own, 0x800, udp4('198.18.0.2', b'done'))
