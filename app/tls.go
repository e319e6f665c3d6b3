// SPDX-License-Identifier: Apache-2.0

package app

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"
)

// selfSignedLife is how long the certificate made at start is valid (llm-d's ten years: gateways do not verify it).
const selfSignedLife = 10 * 365 * 24 * time.Hour

// certReload is how often a certificate folder is looked at; mounted secrets change seldom.
const certReload = 10 * time.Second

// certificate holds the pair in force; its methods are safe for concurrent use.
type certificate struct {
	dir     string // empty for the self-signed one
	current atomic.Pointer[tls.Certificate]
	content []byte // of the files last read; touched by load's caller only
}

// newCertificate reads tls.crt and tls.key of dir, or makes a self-signed pair where dir is empty.
func newCertificate(dir string) (*certificate, error) {
	c := &certificate{dir: dir}
	if dir != "" {
		_, err := c.load()
		return c, err
	}
	pair, err := selfSigned()
	if err != nil {
		return nil, fmt.Errorf("self-signed certificate: %w", err)
	}
	c.current.Store(pair)
	return c, nil
}

// load reads the pair again and reports whether its content changed.
func (c *certificate) load() (changed bool, err error) {
	crt, err := os.ReadFile(filepath.Join(c.dir, "tls.crt"))
	if err != nil {
		return false, fmt.Errorf("--cert-path: %w", err)
	}
	key, err := os.ReadFile(filepath.Join(c.dir, "tls.key"))
	if err != nil {
		return false, fmt.Errorf("--cert-path: %w", err)
	}
	content := append(append([]byte{}, crt...), key...)
	if bytes.Equal(content, c.content) {
		return false, nil
	}
	pair, err := tls.X509KeyPair(crt, key)
	if err != nil {
		return false, fmt.Errorf("--cert-path %s: %w", c.dir, err)
	}
	c.content = content
	c.current.Store(&pair)
	return true, nil
}

// watch reads the folder again every now and then until ctx ends; a bad pair keeps the old one.
func (c *certificate) watch(ctx context.Context, log *slog.Logger) {
	tick := time.NewTicker(certReload)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		switch changed, err := c.load(); {
		case err != nil:
			log.Error("certificate not reloaded, the old one stays", slog.Any("err", err))
		case changed:
			log.Info("certificate reloaded")
		}
	}
}

// config is the server's TLS configuration; HTTP/2 is announced, which gRPC clients insist on.
func (c *certificate) config(minVersion uint16, suites []uint16) *tls.Config {
	return &tls.Config{
		MinVersion: minVersion, CipherSuites: suites, NextProtos: []string{"h2"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.current.Load(), nil },
	}
}

func selfSigned() (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{Organization: []string{"Baton"}, CommonName: "baton"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(selfSignedLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true, DNSNames: []string{"localhost", "baton"},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// tlsMinVersion reads --tls-min-version.
func tlsMinVersion(name string) (uint16, error) {
	switch name {
	case "", "VersionTLS12":
		return tls.VersionTLS12, nil
	case "VersionTLS13":
		return tls.VersionTLS13, nil
	default:
		return 0, fmt.Errorf("--tls-min-version: %q, must be VersionTLS12 or VersionTLS13", name)
	}
}

// tlsSuites reads --tls-cipher-suites; none means Go's choice.
func tlsSuites(names []string) ([]uint16, error) {
	var suites []uint16
	for _, name := range names {
		found := false
		for _, s := range tls.CipherSuites() {
			if s.Name == name {
				suites, found = append(suites, s.ID), true
			}
		}
		if !found {
			return nil, fmt.Errorf("--tls-cipher-suites: %q is not a secure suite that Go knows", name)
		}
	}
	return suites, nil
}
