// The identity provider of the login tests: the certified `oidc-provider`, over TLS on a free port of the loopback,
// with one client, and users that are whoever the login form says.
//
// Started by the test with: certificate and key (files), and the redirect URI of the manager. It prints its port.

import fs from 'node:fs';
import https from 'node:https';
import Provider from 'oidc-provider';

const [certificate, key, redirectUri] = process.argv.slice(2);
const people = JSON.parse(process.env.PEOPLE);

const server = https.createServer({ cert: fs.readFileSync(certificate), key: fs.readFileSync(key) });

server.listen(0, '127.0.0.1', () => {
  const { port } = server.address();
  const issuer = `https://localhost:${port}`;
  const provider = new Provider(issuer, {
    clients: [
      {
        client_id: 'berth',
        client_secret: 'a secret of the test: 100% + / &',
        redirect_uris: [redirectUri],
        grant_types: ['authorization_code', 'urn:ietf:params:oauth:grant-type:device_code'],
        response_types: ['code'],
      },
    ],
    features: { deviceFlow: { enabled: true }, devInteractions: { enabled: true } },
    pkce: { required: () => true },
    scopes: ['openid', 'profile', 'groups'],
    claims: { openid: ['sub'], profile: ['preferred_username'], groups: ['groups'] },
    // Everything is asked by the manager once more at the userinfo endpoint, as with most providers.
    conformIdTokenClaims: process.env.IN_TOKEN !== 'yes',
    findAccount: (_, id) => ({
      accountId: id,
      claims: () => ({ sub: id, preferred_username: people[id]?.name ?? id, groups: people[id]?.groups ?? [] }),
    }),
    cookies: { keys: ['of the test'] },
    ttl: { DeviceCode: 120 },
  });
  provider.proxy = false;
  server.on('request', provider.callback());
  console.log(`PORT ${port}`);
});

process.stdin.on('end', () => process.exit(0)).resume();
