// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"time"

	"github.com/baton-epp/baton/config"
)

const (
	// idleTimeout is how long an unused connection is kept: vLLM closes its end after 5 s.
	idleTimeout = 4 * time.Second
	// maxAnswerHeaderBytes bounds the header section of an answer.
	maxAnswerHeaderBytes = 64 << 10
	// writeBufferBytes per connection sends most requests in one piece.
	writeBufferBytes = 32 << 10
)

// transport is the one way out to model servers. It follows no redirect, asks no proxy, keeps no cookie, resolves no
// name, and dials nothing but addresses in the pool, and for an [introduction] one other port of such an endpoint.
type transport struct {
	*http.Transport
	scheme string
	made   transportKey
}

// transportKey is all of a configuration that a transport depends on.
type transportKey struct {
	scheme, caCertPath string
	insecure           bool
	connectTimeout     time.Duration
	perEndpoint        int
}

// newTransport makes the transport for c, or returns old's where nothing changed. A CA file is read again each time.
func newTransport(c *config.Disaggregation, permitted func(context.Context, netip.AddrPort) bool, old *settings) (*transport, error) {
	key := transportKey{
		c.Transport.Scheme, c.Transport.CACertPath, c.Transport.InsecureSkipVerify, c.Prefill.ConnectTimeout,
		c.Prefill.MaxConcurrentPerEndpoint,
	}
	if old != nil && old.transport.made == key && key.caCertPath == "" {
		return old.transport, nil
	}
	tlsConfig := &tls.Config{
		MinVersion:         tls.VersionTLS12,
		InsecureSkipVerify: key.insecure, //nolint:gosec // the operator asked for it by name
	}
	if key.caCertPath != "" {
		pem, err := os.ReadFile(key.caCertPath)
		if err != nil {
			return nil, fmt.Errorf("caCertPath: %w", err)
		}
		tlsConfig.RootCAs = x509.NewCertPool()
		if !tlsConfig.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("caCertPath: no certificate in %s", key.caCertPath)
		}
	}
	dialer := net.Dialer{Timeout: key.connectTimeout, KeepAlive: 15 * time.Second}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	return &transport{scheme: key.scheme, made: key, Transport: &http.Transport{
		Proxy: nil, // the environment must not redirect prompts
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			addr, err := netip.ParseAddrPort(address)
			if err != nil || !permitted(ctx, addr) {
				return nil, errNotInPool
			}
			return dialer.DialTCP(ctx, "tcp", netip.AddrPort{}, addr)
		},
		TLSClientConfig:        tlsConfig,
		TLSHandshakeTimeout:    key.connectTimeout,
		Protocols:              protocols,
		DisableCompression:     true,
		IdleConnTimeout:        idleTimeout,
		MaxIdleConnsPerHost:    key.perEndpoint, // as many as may be busy at once
		MaxResponseHeaderBytes: maxAnswerHeaderBytes,
		WriteBufferSize:        writeBufferBytes,
	}}, nil
}
