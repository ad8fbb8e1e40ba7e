module worker

go 1.24
