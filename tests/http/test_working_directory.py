"""A server may be started anywhere: what lies there is never imported."""


def test_modules_in_the_working_directory_are_not_run(start_server, tmp_path):
    canary = tmp_path / "ran"
    for name in ("msgspec.py", "torch.py", "app/__init__.py", "models/__init__.py"):
        module = tmp_path / name
        module.parent.mkdir(exist_ok=True)
        module.write_text(f"open({str(canary)!r}, 'w').close()")
    server = start_server(cwd=tmp_path).wait_until_ready()
    assert server.generate().status_code == 200
    assert not canary.exists()
